"""Publishing this checkout's knowledge: every policy asked, then the pointer, then the baseline.

One function for the asset `published_index` and for `ratchet index publish`. What depends on the
clock or on what is live is asked here and in no DVC stage: the age of the sources, and how far
counts and distributions have moved since the version published last. That one's profile is
``<state>/accepted.json``. A crash between the pointer and the baseline leaves the older baseline;
publishing again finishes the work.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from contracts.errors import InputError, QualityError
from contracts.params import load_params
from contracts.settings import Settings
from resources.published import Policy, publish
from stages.acceptance_profile import compare
from stages.acceptance_report import page
from stages.freshness import stale_sources

Row = dict[str, Any]


def publish_knowledge(settings: Settings, accept_change: bool = False) -> dict[str, Any]:
    """Publish data/index and make its profile the one that later versions are compared with.

    Args:
        accept_change: let through a version that moved further than the policy allows.

    Returns the pointer, and under "change" the path of the page that compares. Raises QualityError,
    with the old version still live, when a source is too old, the chunks were not accepted, the
    version moved too far, or the index is below its own policy.
    """
    root, data = settings.root, settings.root / "data"
    params = load_params(root / "params.yaml")
    stale = stale_sources(root, params, time.time())
    if stale:
        raise QualityError(
            "Sources are older than their policy allows.",
            offenders=stale,
            where="params.yaml: acceptance.max_age_days",
            next="bring the sources up to date and commit them",
        )
    now, before = accepted_profile(data / "acceptance"), read_baseline(settings)
    rows = compare(before, now, params.acceptance)
    change = settings.state_dir / "change.html"
    failed = [f"{row['expectation']}: {row['observed']}" for row in rows if not row["success"]]
    replace(change, page({"success": not failed, "expectations": rows}, before, now))
    if failed and not accept_change:
        raise QualityError(
            "This version moved further from the published one than the policy allows.",
            offenders=failed,
            where=str(change),
            next="mend the documents; if the change is meant: ratchet index publish "
            "--accept-change",
        )
    pointer = publish(data / "index", settings, Policy.of(params, data))
    if now != before:
        replace(settings.state_dir / "accepted.json", json.dumps(now, indent=2, sort_keys=True))
    return pointer | {"change": str(change)}


def accepted_profile(folder: Path) -> Row:
    """The profile of data/acceptance. Raises QualityError unless its suite held."""
    try:
        accepted = bool(json.loads((folder / "report.json").read_text("utf-8"))["success"])
        profile: Row = json.loads((folder / "profile.json").read_text("utf-8"))
    except (OSError, ValueError, KeyError):
        accepted = False
    if not accepted:
        raise QualityError(
            "The chunks of this index were not accepted.",
            where=str(folder / "report.html"),
            next="run `dvc repro acceptance` and read its report",
        )
    return profile


def read_baseline(settings: Settings) -> Row | None:
    """The profile of the version published last; None before the first. Raises InputError."""
    path = settings.state_dir / "accepted.json"
    try:
        value: Row = json.loads(path.read_text(encoding="utf-8"))
        _ = value["sources"], value["chunking"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The profile of the published version cannot be read: {error!r}.",
            where=str(path),
            next="remove it: the next publish is then compared with nothing",
        ) from None
    return value


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
