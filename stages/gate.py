"""Stage ``gate``: may this candidate become a release? The verdict, and every reason for it.

In: the scorecard, ``data/stable.json`` (per-question scores of the stable release), the policy
(``params.gate``). Out: ``verdict.json`` (``contracts.records.Verdict``, written last),
``report.html``, ``gate.png``. The exit code is 0 for PASS only; the report is there in every case,
and one that is no PASS is kept in ``<state>/refused/gate``.

* INVALID: evidence is missing. Nobody may conclude anything, good or bad.
* FAIL: the candidate misses a floor, or is *shown* to be worse than the stable release or than its
  own base model: the one-sided 95 % upper bound of the mean paired difference is below zero.
* PASS: neither. It proves no equality: with few questions a loss can hide, so each comparison says
  which loss it would have noticed in four of five cases (``detectable``) and whether a loss beyond
  the policy's margin is excluded (``non_inferior``).

The comparison is a paired bootstrap over documents. A rule that blocks on a lower mean stops 44 to
48 % of equal candidates; this one stops 5 to 7 % per metric compared. Its power is small while
questions are few: over 10 documents of 10 questions each, a quarter of them answered otherwise, it
notices a true loss of 5, 10 or 20 points in 25, 55 and 95 % of cases (1,500 simulations).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracts.digests import path_md5
from contracts.errors import GateError, InputError
from contracts.params import Gate, Params
from contracts.records import Score, Verdict
from contracts.settings import Settings
from resources.scorers import deterministic as scoring
from stages import gate_report, harness, statistics
from stages.evidence import read_scores

#: z(0.95) + z(0.80): a one-sided test at 5 % with 80 % power.
POWER_Z = 1.645 + 0.842

Values = dict[str, float]  # question id → value


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``, then raise GateError unless the verdict is PASS."""
    card = read_card(paths.scorecard)
    stable = read_stable(paths.stable)
    compared = opponent(stable, path_md5(paths.scorecard))
    verdict = judge(card, compared, params.gate)
    gate_report.write(verdict, card, compared, paths.out)
    for reason in verdict.reasons:
        harness.progress(f"gate: {reason}")
    if verdict.verdict != "PASS":
        kept = keep(paths.out)
        raise GateError(
            f"The gate says {verdict.verdict}.",
            offenders=verdict.reasons,
            where=str(kept / "verdict.json"),
            next=f"read {kept / 'report.html'}, and docs/gates.md",
        )
    return {"passed": 1.0, "checks": float(len(verdict.checks))}


def keep(out: Path) -> Path:
    """Copy the folder to ``<state>/refused/gate`` and return that: a failed stage's output does not
    stay, because the last good one is checked out again in its place."""
    kept = Settings.from_env().state_dir / "refused" / "gate"
    shutil.rmtree(kept, ignore_errors=True)
    return Path(shutil.copytree(out, kept))


@dataclass(frozen=True)
class Card:
    """A scorecard as the gate reads it."""

    questions: dict[str, dict[str, Any]]  # id → id, question, document, answerable
    scores: dict[tuple[str, str], dict[str, Score]]  # (system, metric) → question id → score
    systems: dict[str, Any]  # the summary's means and intervals

    def expected(self, system: str, metric: str) -> list[str]:
        """Questions that must have this score. Metrics from elsewhere apply to answerable ones."""
        applies = scoring.METRICS.get(metric, "answerable")
        if applies == "answered":
            return [question for question in self.questions if not self._refused(system, question)]
        return [
            name
            for name, item in self.questions.items()
            if item["answerable"] == (applies == "answerable")
        ]

    def _refused(self, system: str, question: str) -> bool:
        found = (
            self.scores.get((system, name), {}).get(question)
            for name in ("false_refusal", "refusal_on_unanswerable")
        )
        return any(score is not None and score.value == 1.0 for score in found)

    def cluster(self, question: str) -> str:
        """What is resampled together: the document, or the question itself where it has none."""
        return self.questions[question]["document"] or question


def read_card(folder: Path) -> Card:
    """Read ``data/scorecard``. Raises InputError where it is incomplete."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"The scorecard is incomplete: {error}", where=str(folder), next="dvc repro scorecard"
        ) from None
    rows = read_scores(folder / "scores.parquet")
    scores: dict[tuple[str, str], dict[str, Score]] = {}
    for row in rows:
        scores.setdefault((row.system, row.metric), {})[row.question_id] = row
    return Card({item["id"]: item for item in summary["questions"]}, scores, summary["systems"])


def read_stable(path: Path) -> dict[str, Any] | None:
    """The stable release's scores, or None where there is no stable release.

    Raises:
        InputError: the file is missing or lacks a part.
    """
    try:
        stable = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "data/stable.json does not exist.", where=str(path), next='write {"release": null}'
        ) from None
    except ValueError as error:
        raise InputError(f"data/stable.json is not JSON: {error}", where=str(path)) from None
    if not isinstance(stable, dict) or "release" not in stable:
        raise InputError(
            'data/stable.json has no "release".', where=str(path), next='write {"release": null}'
        )
    if stable["release"] is None:
        return None
    missing = [f'no "{key}"' for key in ("scorecard", "scores") if not stable.get(key)]
    if missing:
        raise InputError(
            "data/stable.json names a release without its scores.",
            where=str(path),
            offenders=missing,
        )
    return stable


def opponent(stable: Mapping[str, Any] | None, md5: str) -> Mapping[str, Any] | None:
    """The release to compare with: the stable one, or, where that was made from this very card
    (digest ``md5``), the one that *it* was compared with.

    A release is no second opinion on itself. And the file must say after a deployment what it said
    before: otherwise deploying a release would change the verdict and with it the release's own id.
    """
    if stable is None or stable["scorecard"] != md5:
        return stable
    return stable.get("previous")


def baseline_from_scorecard(
    scores: Path, release_id: str, md5: str, previous: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What ``data/stable.json`` holds once this scorecard's candidate is the stable release.

    Args:
        scores: its scores.parquet.
        release_id: the release.
        md5: digest of the scorecard folder, as dvc.lock has it.
        previous: what ``data/stable.json`` held until now, which this candidate was compared with
            (None, or a "release" of None: with nothing). See :func:`opponent`.
    """
    values: dict[str, Values] = {}
    for row in read_scores(scores):
        if row.system == "candidate" and row.value is not None:
            values.setdefault(row.question_id, {})[row.metric] = row.value
    ordered = {name: dict(sorted(metrics.items())) for name, metrics in sorted(values.items())}
    before = None
    if previous is not None and previous.get("release") is not None:
        before = {key: previous[key] for key in ("release", "scorecard", "scores")}
    return {"release": release_id, "scorecard": md5, "scores": ordered, "previous": before}


@dataclass
class Bench:
    """What has been found so far."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(card: Card, stable: Mapping[str, Any] | None, policy: Gate) -> Verdict:
    """The verdict over a card. Pure: the same card, baseline and policy give the same verdict."""
    bench = Bench()
    values: dict[tuple[str, str], Values | None] = {}  # None: reported as INVALID, nothing to check
    for system, metric in [("candidate", floor.metric) for floor in policy.floors] + [
        (system, metric) for metric in policy.paired for system in ("candidate", "base")
    ]:
        if (system, metric) not in values:
            values[system, metric] = _complete(card, system, metric, policy, bench)
    for floor in policy.floors:
        if (mine := values["candidate", floor.metric]) is not None:
            _floor(card, floor.metric, floor.min, mine, policy, bench)
    for metric in policy.paired:
        others = {"base": values["base", metric]}
        if stable is not None:
            others["stable"] = _baseline(card, metric, stable, policy, bench)
        if (mine := values["candidate", metric]) is not None:
            for other, theirs in others.items():
                if theirs is not None:
                    _paired(card, other, metric, mine, theirs, policy, bench)
    failed = [check["detail"] for check in bench.checks if not check["passed"]]
    word, reasons = ("INVALID", bench.invalid) if bench.invalid else ("FAIL", failed)
    if not reasons:
        word = "PASS"
        reasons = [check["detail"] for check in bench.checks]
    return Verdict.model_validate(
        {
            "verdict": word,
            "reasons": [*reasons, *bench.notes],
            "policy": policy.model_dump(),
            "checks": bench.checks,
            "baseline": stable["scorecard"] if stable else None,
        }
    )


def _complete(card: Card, system: str, metric: str, policy: Gate, bench: Bench) -> Values | None:
    """Values of one metric, after asking whether all are there.

    Up to the share ``max_invalid`` may be missing; those count as the worst value, so that a
    failure can never raise a mean. None: there is nothing to check, and that was reported.
    """
    scores = card.scores.get((system, metric))
    expected = card.expected(system, metric)
    if scores is None and (expected or metric not in scoring.METRICS):
        bench.invalid.append(f"{system} {metric}: the scorecard has no such metric")
        return None
    if not expected and scoring.METRICS.get(metric) != "answered":
        bench.invalid.append(
            f"{system} {metric}: no test question is of the kind that it applies to"
        )
        return None
    found = {
        name: score.value
        for name in expected
        if (score := (scores or {}).get(name)) and score.value is not None
    }
    missing = [name for name in expected if name not in found]
    if len(missing) > policy.max_invalid * len(expected):
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        bench.invalid.append(
            f"{system} {metric}: {len(missing)} of {len(expected)} scores are missing "
            f"(at most {policy.max_invalid:.1%} may be): {shown}"
        )
    worst = 1.0 if metric in scoring.LOWER_IS_BETTER else 0.0
    return {name: found.get(name, worst) for name in expected}


def _floor(
    card: Card, metric: str, bound: float, values: Values, policy: Gate, bench: Bench
) -> None:
    """One floor: the candidate's mean at or above ``bound``."""
    check: dict[str, Any] = {"name": metric, "kind": "floor", "bound": bound}
    if not values:
        text = f"{metric}: nothing to judge, the candidate refused every question; floor {bound:g}"
        bench.checks.append(check | {"value": None, "passed": False, "n": 0, "detail": text})
        return
    found = statistics.estimate(
        list(values.values()),
        [card.cluster(name) for name in values],
        policy.resamples,
        policy.seed,
    )
    passed = found.mean >= bound
    text = (
        f"{metric}: mean {found.mean:.3f} {'meets' if passed else 'misses'} the floor {bound:g} "
        f"(95 % interval {found.low:.3f} to {found.high:.3f}, n = {found.n})"
    )
    bench.checks.append(
        check
        | {
            "value": found.mean,
            "passed": passed,
            "low": found.low,
            "high": found.high,
            "n": found.n,
            "clusters": found.clusters,
            "unit": found.unit,
            "detail": text,
        }
    )


def _baseline(
    card: Card, metric: str, stable: Mapping[str, Any], policy: Gate, bench: Bench
) -> Values:
    """The stable release's values of the questions that are still asked."""
    theirs = {name: values[metric] for name, values in stable["scores"].items() if metric in values}
    common = {name: value for name, value in theirs.items() if name in card.questions}
    if not theirs or len(common) < policy.min_common * len(theirs):
        bench.invalid.append(
            f"stable {metric}: only {len(common)} of the {len(theirs)} questions that release "
            f"{stable['release']} was scored on are still asked "
            f"(at least {policy.min_common:.0%} must be)"
        )
    new = [name for name in card.expected("candidate", metric) if name not in theirs]
    if new:
        bench.notes.append(
            f"note: {metric}: {len(new)} questions are new since release {stable['release']} "
            "and not compared"
        )
    return common


def _paired(
    card: Card, other: str, metric: str, mine: Values, theirs: Values, policy: Gate, bench: Bench
) -> None:
    """One paired comparison, candidate minus ``other``, question by question."""
    import numpy as np

    common = [name for name in mine if name in theirs]
    if len(common) < 2:
        bench.invalid.append(
            f"{other} {metric}: {len(common)} questions in common; a comparison needs two"
        )
        return
    sign = -1.0 if metric in scoring.LOWER_IS_BETTER else 1.0
    differences = [sign * (mine[name] - theirs[name]) for name in common]
    clusters = [card.cluster(name) for name in common]
    means, unit = statistics.resampled_means(differences, clusters, policy.resamples, policy.seed)
    low, high = (round(float(bound), 6) + 0.0 for bound in np.quantile(means, [0.05, 0.95]))
    mean = round(sum(differences) / len(differences), 6) + 0.0
    passed = high >= 0
    check = {
        "name": metric,
        "kind": f"paired_{other}",
        "value": mean,
        "bound": 0.0,
        "passed": passed,
        "low": low,
        "high": high,
        "n": len(common),
        "clusters": len(set(clusters)),
        "unit": unit,
        "changed": sum(difference != 0 for difference in differences),
        "non_inferior": low > -policy.margin,
        "detectable": round(POWER_Z * float(np.std(means)), 6),
    }
    shown = "is worse than" if not passed else "is not shown to be worse than"
    text = (
        f"{metric}: candidate {shown} {other}: mean difference {mean:+.3f}, "
        f"one-sided 95 % bounds {low:+.3f} and {high:+.3f}, n = {len(common)}"
    )
    bench.checks.append(check | {"detail": text})
    if passed and not check["non_inferior"]:
        bench.notes.append(
            f"note: {metric}: a loss of more than {policy.margin:g} against {other} is not "
            f"excluded; a loss of {check['detectable']:.3f} is noticed in four of five cases"
        )
    if unit == "question":
        bench.notes.append(
            f"note: {metric}: fewer than {statistics.MIN_CLUSTERS} documents, "
            "so bounds are optimistic"
        )


if __name__ == "__main__":
    harness.main("gate", run, paths=("scorecard", "stable", "out"))
