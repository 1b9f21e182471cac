"""What follows the ledger beside the channels' pointers: MLflow's aliases and the gate's baseline.

``data/stable.json`` is a function of the release that the channel ``stable`` serves: its scores,
the timings of its gate, and the scores that it was compared with itself. Both may be made right at
any time, by whoever comes next.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from contracts.digests import path_md5
from contracts.errors import NotFoundError
from contracts.records import Member, Release
from contracts.settings import Settings
from resources import registry, releases
from resources.ledger import Ledger

BASELINE = Path("data/stable.json")
SCORES = "scores.parquet"


def follow(settings: Settings, ledger: Ledger) -> list[str]:
    """Bring aliases and baseline to what the ledger says. Returns what was moved, in sentences."""
    moved = registry.follow(settings, ledger)
    line = follow_baseline(settings, ledger)
    return [*moved, line] if line else moved


def follow_baseline(settings: Settings, ledger: Ledger) -> str | None:
    """Write ``data/stable.json`` for the stable release, unless it holds its scorecard already:
    deploying the same answers again leaves the gate as it was. Returns what was done.

    Raises NotFoundError when the release or its scores are not here.
    """
    last = ledger.last(registry.STABLE)
    if last is None or last.pointer is None:
        return None
    release = releases.load(settings, last.pointer.release).release
    path = settings.root / BASELINE
    before = _read(path)
    if before.get("scorecard") == release.members["scorecard"].md5:
        return None
    value = baseline(release, before, settings.root)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
    return f"{BASELINE}: {before.get('release') or 'none'} -> {release.id}"


def baseline(release: Release, before: dict[str, Any], root: Path) -> dict[str, Any]:
    """What ``data/stable.json`` holds while ``release`` is the stable one.

    Args:
        before: what it holds now.
        root: the checkout.
    """
    from stages.gating.card import baseline_from_scorecard

    card = release.members["scorecard"]
    # A release is compared anew with what it was compared with, or its verdict would change. After
    # a promotion that is what the file holds; after a rollback it may stand one further back.
    rivals = [item for item in (before, before.get("previous")) if item]
    rival = next((r for r in rivals if r.get("scorecard") == release.gate.get("baseline")), None)
    scores = _scores(card, root)
    if scores is None:
        raise NotFoundError(
            f"The scores of release {release.id} are neither in the workspace nor in DVC's cache.",
            where=f"{card.path} at {card.md5}",
            next="dvc fetch scorecard at the commit of its dvc.lock, then: ratchet ledger follow",
        )
    measured = _measured(release.members["gate"], root)
    return baseline_from_scorecard(scores, release.id, card.md5, rival, measured)


def _scores(member: Member, root: Path) -> Path | None:
    """scores.parquet of that very scorecard, from the workspace or from DVC's cache."""
    from resources.tracking import resolve_file

    return resolve_file(member.path, member.md5, root, SCORES)


def _measured(member: Member, root: Path) -> dict[str, Any] | None:
    """The timings beside that very verdict. They are no part of a release, so they are known only
    while the verdict lies in the workspace; without them the next gate compares no timings."""
    verdict = root / member.path
    path = verdict.with_name("measured.json")
    if not path.is_file() or not verdict.is_file() or path_md5(verdict) != member.md5:
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _read(path: Path) -> dict[str, Any]:
    """The file as it stands; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
