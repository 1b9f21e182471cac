"""Which version of a prompt passed the gate with which model: the matrix, and what serving reads.

A release is the certificate of its own pair: model and prompt were judged together. So the pairs
that passed are those of the ledger's verdicts. Serving reads no ledger; :func:`follow` writes what
passed to ``<state>/certified.json``, and a gateway offers a prompt version beside the release's own
only where that file has it with the release's very model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contracts.records import Release
from contracts.settings import Settings
from resources.ledger import Ledger


@dataclass(frozen=True)
class Pair:
    """One verdict on a model with a prompt."""

    model: str  # md5 of the served checkpoint
    prompt: str  # <name>/<version>
    sha256: str  # of the prompt's text: a version that was edited is another one
    verdict: str
    release: str
    policy: str  # sha256 of the policy that judged
    time: str


def pair_of(release: Release) -> dict[str, str]:
    """Model and prompt of a release, as the ledger's ``verdict`` rows keep them."""
    return {
        "model": str(release.model.get("checkpoint_md5", "")),
        "prompt": f"{release.prompt['name']}/{release.prompt['version']}",
        "sha256": release.prompt["sha256"],
    }


def matrix(ledger: Ledger) -> list[Pair]:
    """Every verdict, oldest first."""
    return [
        Pair(
            **entry.body["pair"],
            verdict=str(entry.body["gate"].get("verdict")),
            release=entry.release,
            policy=str(entry.body["gate"].get("policy_sha256") or ""),
            time=entry.time,
        )
        for entry in ledger.entries(kinds=["verdict"])
        if "pair" in entry.body
    ]


def path(settings: Settings) -> Path:
    return settings.state_dir / "certified.json"


def follow(settings: Settings, ledger: Ledger) -> None:
    """Write what serving reads, where the ledger says something else now. Safe to repeat."""
    passed = [asdict(pair) for pair in matrix(ledger) if pair.verdict == "PASS"]
    text = json.dumps(passed, indent=1) + "\n"
    target = path(settings)
    if not passed or (target.is_file() and target.read_text(encoding="utf-8") == text):
        return
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(target)


def certified(settings: Settings, model: str) -> frozenset[str]:
    """SHA-256 of every prompt text that passed with that model. A file that cannot be read
    certifies nothing."""
    try:
        rows = json.loads(path(settings).read_text(encoding="utf-8"))
        return frozenset(str(row["sha256"]) for row in rows if row["model"] == model)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def render(pairs: list[Pair], names: Mapping[str, str] = {}) -> str:
    """The matrix for a terminal: prompts down, models across; the newest verdict of each pair.

    Args:
        names: what a model is called beside its digest, for example its channel.
    """
    newest: dict[tuple[str, str], Pair] = {(p.prompt, p.model): p for p in pairs}
    if not newest:
        return "the ledger holds no verdict yet; `ratchet run lifecycle` registers a release"
    models = list(dict.fromkeys(pair.model for pair in pairs))
    heads = [_head(model, names) for model in models]
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    width = max(map(len, [*prompts, "prompt"]))
    lines = ["  ".join([f"{'prompt':<{width}}", *(f"{head:<26}" for head in heads)]).rstrip()]
    for prompt in prompts:
        cells = [_cell(newest.get((prompt, model))) for model in models]
        row = "  ".join([f"{prompt:<{width}}", *(f"{cell:<26}" for cell in cells)])
        lines.append(row.rstrip())
    return "\n".join(lines)


def _head(model: str, names: Mapping[str, str]) -> str:
    name = names.get(model)
    return f"{model[:12]} ({name})" if name else model[:12]


def _cell(pair: Pair | None) -> str:
    return f"{pair.verdict} {pair.release}" if pair else "not judged together"


def as_json(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [asdict(pair) for pair in pairs]
