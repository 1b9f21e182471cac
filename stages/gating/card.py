"""What the gate judges by: the scorecard, and the scores of the releases that it compares with.

In: ``data/scorecard``, ``data/stable.json``, ``data/anchor.json``. Out: scores by metric and
question, and which of them there should be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.policy import Opponent
from contracts.records import Score
from resources.scorers import deterministic as scoring
from stages.evidence import read_scores

Values = dict[str, float]  # question id -> value
Scores = dict[str, Values]  # metric -> question id -> value; what is invalid is left out


@dataclass(frozen=True)
class Card:
    """The candidate's scores and its base model's, and the questions."""

    questions: dict[str, dict[str, Any]]  # id -> id, question, document, answerable, style, kind
    candidate: Scores
    base: Scores
    known: frozenset[tuple[str, str]]  # (system, metric) that has any row, invalid ones included
    policy: str | None  # digest of the policy that was recorded before scoring
    safety: dict[str, dict[str, Any]] = field(default_factory=dict)  # prompt id -> suite, question
    digest: str = ""  # of the scorecard folder, as dvc.lock has it
    doubts: Mapping[str, str] = field(default_factory=dict)  # metric -> why it may decide nothing

    def expected(self, scores: Scores, metric: str) -> list[str]:
        """Questions that must have this score. Metrics from elsewhere apply to answerable ones."""
        applies = scoring.METRICS.get(metric, "answerable")
        if applies == "answered":
            return [name for name in self.questions if not refused(scores, name)]
        return [
            name
            for name, item in self.questions.items()
            if item["answerable"] == (applies == "answerable")
        ]

    def cluster(self, question: str) -> str:
        """What is resampled together: the document, or the question itself where it has none."""
        return str(self.questions[question]["document"] or question)


@dataclass(frozen=True)
class Other:
    """A system to compare with. ``release`` None: the base model."""

    name: Opponent
    scores: Scores
    release: str | None = None
    scorecard: str | None = None
    measured: Mapping[str, Any] | None = None


def refused(scores: Scores, question: str) -> bool:
    """Whether that answer was a refusal."""
    return any(
        scores.get(name, {}).get(question) == 1.0
        for name in ("false_refusal", "refusal_on_unanswerable")
    )


def read_card(folder: Path, digest: str) -> Card:
    """Read ``data/scorecard``. Raises InputError where it is incomplete."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"The scorecard is incomplete: {error}", where=str(folder), next="dvc repro scorecard"
        ) from None
    return card_of(read_scores(folder / "scores.parquet"), summary, digest)


def card_of(rows: Sequence[Score], summary: Mapping[str, Any], digest: str = "") -> Card:
    """A card from score rows and the scorecard's summary."""
    return Card(
        questions={item["id"]: dict(item) for item in summary["questions"]},
        candidate=by_metric(rows, "candidate"),
        base=by_metric(rows, "base"),
        known=frozenset((row.system, row.metric) for row in rows),
        policy=summary.get("policy"),
        safety={item["id"]: dict(item) for item in summary.get("safety", [])},
        digest=digest,
        doubts={
            metric: fact["uncalibrated"]
            for metric, fact in summary.get("scorers", {}).items()
            if fact.get("uncalibrated")
        },
    )


def by_metric(rows: Sequence[Score], system: str) -> Scores:
    """Valid scores of one system."""
    found: Scores = {}
    for row in rows:
        if row.system == system and row.value is not None:
            found.setdefault(row.metric, {})[row.question_id] = row.value
    return found


# -- releases to compare with --------------------------------------------------------------------


def read_other(path: Path, name: Opponent, own: str) -> Other | None:
    """The release that ``path`` (data/stable.json, data/anchor.json) describes, or None.

    A file made from this very card (digest ``own``) stands for the one that *it* was compared with:
    a release is no second opinion on itself. And the verdict must say after a deployment what it
    said before; otherwise deploying a release would change the verdict and so the release's own id.

    Raises:
        InputError: the file is missing or lacks a part.
    """
    content = read_baseline(path)
    if content is not None and content["scorecard"] == own:
        content = content.get("previous")
    if content is None:
        return None
    scores: Scores = {}
    for question, values in content["scores"].items():
        for metric, value in values.items():
            scores.setdefault(metric, {})[question] = value
    return Other(name, scores, content["release"], content["scorecard"], content.get("measured"))


def read_baseline(path: Path) -> dict[str, Any] | None:
    """A baseline file's content, or None where it names no release. Raises InputError."""
    where, hint = str(path), 'write {"release": null}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} does not exist.", where=where, next=hint) from None
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}", where=where) from None
    if not isinstance(content, dict) or "release" not in content:
        raise InputError(f'{path.name} has no "release".', where=where, next=hint)
    if content["release"] is None:
        return None
    missing = [f'no "{key}"' for key in ("scorecard", "scores") if not content.get(key)]
    if missing:
        raise InputError(
            f"{path.name} names a release without its scores.", where=where, offenders=missing
        )
    return content


def baseline_from_scorecard(
    scores: Path,
    release_id: str,
    md5: str,
    previous: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``data/stable.json`` or ``data/anchor.json`` holds for this scorecard's candidate.

    Args:
        scores: its scores.parquet.
        release_id: the release.
        md5: digest of the scorecard folder, as dvc.lock has it.
        previous: what the file held until now, which this candidate was compared with (None, or a
            "release" of None: with nothing). See :func:`read_other`.
        measured: its ``data/gate/measured.json``, where there is one: the next candidate's timings
            are compared with these on the same kind of machine.
    """
    values: dict[str, Values] = {}
    for row in read_scores(scores):
        if row.system == "candidate" and row.value is not None:
            values.setdefault(row.question_id, {})[row.metric] = row.value
    ordered = {name: dict(sorted(metrics.items())) for name, metrics in sorted(values.items())}
    before = None
    if previous is not None and previous.get("release") is not None:
        before = {key: previous.get(key) for key in ("release", "scorecard", "scores", "measured")}
    return {
        "release": release_id,
        "scorecard": md5,
        "scores": ordered,
        "measured": {key: measured[key] for key in ("machine", "figures")} if measured else None,
        "previous": before,
    }
