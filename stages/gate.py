"""Stage ``gate``: may this candidate become a release? The verdict, and every reason for it.

In: the scorecard, the profile, the bundle's memory plan, the policy (``data/policies/gate.yaml``),
and the scores of the live release and of the anchor; to answer reserve questions also the bundle,
base model, index and prompts. Out: ``verdict.json`` (``contracts.records.Verdict``, written last),
``measured.json`` (figures of this machine), ``reserve.parquet`` where reserve questions were asked,
``report.html`` and its pictures.

The exit code is 0 for PASS only: 3 is FAIL, 5 UNDECIDED, 6 INVALID (``contracts.errors``). The
report is there in every case, and one that is no PASS is kept in ``<state>/refused/gate``, because
a failed stage's output does not stay: the last good one is checked out again in its place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from contracts.digests import path_md5
from contracts.errors import GateError, InputError, InvalidError, UndecidedError
from contracts.params import Params
from contracts.policy import load_policy
from contracts.records import Word
from contracts.settings import Settings
from stages import harness
from stages.evidence import read_examples, write_scores
from stages.gating import report
from stages.gating.card import Other, read_card, read_other
from stages.gating.reserve import Reserve
from stages.gating.verdict import Case, judge

ERRORS: dict[Word, type[GateError]] = {
    "FAIL": GateError,
    "UNDECIDED": UndecidedError,
    "INVALID": InvalidError,
}
NEXT = {
    "FAIL": "see `ratchet gate explain`",
    "UNDECIDED": "more questions (data/golden/questions.yaml, examples.reserve); "
    "see `ratchet gate explain`",
    "INVALID": "complete the evidence; see `ratchet gate explain`",
}


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``, then raise GateError unless the verdict is PASS."""
    policy = load_policy(paths.policy)
    own = path_md5(paths.scorecard)
    card = read_card(paths.scorecard, own)
    others = [Other("base", card.base)]
    others += [
        other
        for path, name in ((paths.stable, "live"), (paths.anchor, "anchor"))
        if (other := read_other(path, name, own)) is not None  # type: ignore[arg-type]
    ]
    asked = read_examples(paths.examples / "reserve.jsonl", may_be_empty=True)
    reserve = Reserve(paths, params, asked)
    case = Case(
        card,
        others,
        profile=read_json(paths.profile / "profile.json", "profile"),
        plan=read_json(paths.bundle / "memory.json", "bundle"),
        reserve=len(reserve.examples),
        draw=reserve.draw,
    )
    judged = judge(case, policy)
    out = harness.fresh_dir(paths.out)
    if reserve.rows:
        write_scores(reserve.rows, out / "reserve.parquet")
    harness.write_json(out / "measured.json", judged.measured)
    report.write(judged, policy, out)
    verdict = judged.verdict
    harness.write_json(out / "verdict.json", verdict.model_dump(mode="json"))
    for reason in verdict.reasons:
        harness.progress(f"gate: {reason}")
    refused = Settings.from_env().state_dir / "refused" / "gate"
    if verdict.verdict != "PASS":
        kept = keep(out, refused)
        raise ERRORS[verdict.verdict](
            f"The gate says {verdict.verdict}.",
            offenders=verdict.reasons,
            where=str(kept / "report.html"),
            next=NEXT[verdict.verdict],
        )
    if own in kept_scorecards(refused):  # what was refused of this card no longer holds
        shutil.rmtree(refused, ignore_errors=True)
    return {
        "passed": 1.0,
        "checks": float(len(verdict.checks)),
        "looks": float(len(verdict.looks)),
    }


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """A file of evidence. Raises InputError where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"Evidence is missing: {error}", where=str(path), next=f"dvc repro {stage}"
        ) from None
    return found


def kept_scorecards(refused: Path) -> list[str]:
    """The digest of the scorecard that the kept verdict is of; none where none is kept."""
    try:
        return [json.loads((refused / "verdict.json").read_text(encoding="utf-8"))["scorecard"]]
    except (OSError, ValueError, KeyError):
        return []


def keep(out: Path, refused: Path) -> Path:
    """Copy the folder to ``refused``, whole or not at all, and return that."""
    part = refused.with_name("gate.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(out, part)
    shutil.rmtree(refused, ignore_errors=True)
    part.rename(refused)
    return refused


if __name__ == "__main__":
    harness.main(
        "gate",
        run,
        paths=(
            "scorecard", "profile", "bundle", "base_model", "index", "prompts", "examples",
            "judges", "stable", "anchor", "policy", "out",
        ),
    )  # fmt: skip
