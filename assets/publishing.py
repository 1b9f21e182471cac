"""Publishing this checkout's knowledge: every policy asked, then the pointer, then the baseline.

One function for the asset `published_index` and for `ratchet index publish`. A crash between the
pointer and the baseline leaves the older baseline; publishing again finishes the work.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from contracts.errors import QualityError
from contracts.params import load_params
from contracts.settings import Settings
from resources.published import Policy, publish
from stages.acceptance import accept
from stages.freshness import stale_sources


def publish_knowledge(settings: Settings) -> dict[str, Any]:
    """Publish data/index and make its profile the one that later versions are compared with.

    Returns the pointer. Raises QualityError, with the old version still live, when a source is too
    old, acceptance did not succeed, or the index is below its own policy.
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
    _check_accepted(data / "acceptance" / "report.json")
    pointer = publish(data / "index", settings, Policy.of(params, data))
    accept(root)
    return pointer


def _check_accepted(report: Path) -> None:
    try:
        accepted = bool(json.loads(report.read_text(encoding="utf-8"))["success"])
    except (OSError, ValueError, KeyError):
        accepted = False
    if not accepted:
        raise QualityError(
            "The chunks of this index were not accepted.",
            where=str(report),
            next="run `dvc repro acceptance` and read its report.html",
        )
