"""What the gate left: its last verdict, and the frozen anchor. Pure files, no Dagster.

In: data/gate, <state>/refused/gate, data/release.json and its scorecard. Out: the verdict with its
measured figures; data/anchor.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from contracts.digests import path_md5
from contracts.errors import InputError
from contracts.records import Verdict
from contracts.settings import Settings


def last_verdict(settings: Settings) -> dict[str, Any]:
    """The verdict over the scorecard that stands in data/, with the measured figures put back.

    A refused one is kept in the state folder, because data/gate is then that of the last PASS.
    Raises InputError where there is none.
    """
    from stages.gating.report import with_figures

    refused = settings.state_dir / "refused" / "gate"
    here = settings.root / "data" / "gate"
    current = scorecard_md5(settings.root / "data" / "scorecard")
    read = [(folder, _read(folder)) for folder in (refused, here)]
    known = [(folder, found) for folder, found in read if found is not None]
    if not known:
        raise InputError(
            "The gate has not judged anything here.", where=str(here), next="dvc repro gate"
        )
    ofthis = [(folder, found) for folder, found in known if found[0].scorecard == current]
    folder, (verdict, measured) = (ofthis or known[::-1])[0]
    checks = with_figures(verdict.checks, measured)
    return {
        "verdict": verdict.verdict,
        "families": verdict.families,
        "reasons": verdict.reasons,
        "checks": [check.model_dump(mode="json") for check in checks],
        "looks": verdict.looks,
        "policy_sha256": verdict.policy_sha256,
        "baseline": verdict.baseline,
        "anchor": verdict.anchor,
        "current": bool(ofthis),
        "report": str(folder / "report.html"),
    }


def _read(folder: Path) -> tuple[Verdict, dict[str, Any]] | None:
    try:
        verdict = Verdict.model_validate_json((folder / "verdict.json").read_text("utf-8"))
        measured = json.loads((folder / "measured.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # none, or one of an earlier version
        return None
    return verdict, measured


def scorecard_md5(folder: Path) -> str | None:
    return path_md5(folder) if folder.is_dir() else None


def move_anchor(settings: Settings, reason: str) -> str:
    """Write data/anchor.json from the release and scorecard that stand in data/; what it says.

    Raises:
        InputError: there is no release, or the scorecard here is not the release's.
    """
    from resources.releases import certified, read_release
    from stages.gating.card import baseline_from_scorecard, read_baseline

    data = settings.root / "data"
    release = certified(read_release(data / "release.json"), str(data / "release.json"))
    md5 = scorecard_md5(data / "scorecard")
    if md5 != release.members["scorecard"].md5:
        raise InputError(
            f"The scorecard here is not that of release {release.id}.",
            where=str(data / "scorecard"),
            next="dvc checkout data/scorecard, or dvc repro release",
        )
    path = data / "anchor.json"
    before = read_baseline(path)
    if before is not None and before["scorecard"] == md5:
        return f"release {release.id} is the anchor already"
    value = baseline_from_scorecard(data / "scorecard" / "scores.parquet", release.id, md5, before)
    part = path.with_name("anchor.json.part")
    text = json.dumps(value | {"reason": reason}, indent=2, sort_keys=True, ensure_ascii=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    was = f", before {before['release']}" if before else ""
    return f"anchor: release {release.id}{was}. Commit data/anchor.json."
