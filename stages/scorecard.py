"""Stage ``scorecard``: every answer scored, question by question.

In: ``answers.parquet`` and ``examples/test.jsonl`` (which questions there must be). Out: a folder
with ``scores.parquet`` (rows of ``contracts.records.Score``) and ``summary.json`` (means with
intervals, counts of invalid scores, overall and per document; written last).

The metrics of ``resources.scorers.deterministic`` need no model, and neither do those taken from
ragas. A score that could not be computed keeps its row, with no value and the reason. Means are
over what has a value and always stand beside the number that has none; the gate refuses to judge
such a card. A metric that does not apply to a question (a citation, where the answer is a refusal)
has no row at all.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError, InputError
from contracts.params import Params
from contracts.records import Example, Score
from resources.scorers import deterministic as scoring
from stages import harness, statistics, tables
from stages.evidence import SYSTEMS, System, read_examples, write_scores

RESAMPLES, SEED = 2000, 7
#: ragas 0.4.3's collections (its new API) that need neither model nor embeddings, all of
#: (reference, response). The old ``evaluate()`` is not used: it turns failures into NaN and drops
#: them from the mean (ragas#3028).
RAGAS = {
    "rouge_score": "RougeScore",
    "bleu_score": "BleuScore",
    "chrf_score": "CHRFScore",
    "non_llm_string_similarity": "NonLLMStringSimilarity",
    "string_presence": "StringPresence",
}
Row = Mapping[str, Any]
Scorer = Callable[[str, str], float]


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``; metrics are ``<system>_<metric>`` means and ``invalid``."""
    examples = read_examples(paths.examples / "test.jsonl")
    answers = read_answers(paths.answers)
    scorers = ragas_scorers(params.scorecard.ragas)
    scores: list[Score] = []
    for system in SYSTEMS:
        for example in examples:
            scores += score_question(example, system, answers.get((example.id, system)), scorers)
    summary = summarise(scores, examples)
    out = harness.fresh_dir(paths.out)
    write_scores(scores, out / "scores.parquet")
    harness.write_json(out / "summary.json", summary)
    report_lines(summary)
    return flat_metrics(summary)


def read_answers(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of answers.parquet by question and system. Raises InputError for a doubled row."""
    columns = ["question_id", "system", "question", "passages", "answer", "error"]
    found: dict[tuple[str, str], Row] = {}
    for row in tables.read_table(path, columns).to_pylist():
        key = (row["question_id"], row["system"])
        if key in found:
            raise InputError(
                f"Two answers of {key[1]} to {key[0]}.",
                where=str(path),
                next="dvc repro --force answers",
            )
        found[key] = row
    return found


def metrics_for(example: Example, refused: bool, ragas: Sequence[str]) -> list[str]:
    """Metrics that this question must have a score of."""
    kinds = {"answerable" if example.answerable else "unanswerable"} | (
        set() if refused else {"answered"}
    )
    names = [name for name, applies in scoring.METRICS.items() if applies in kinds]
    return names + (list(ragas) if example.answerable else [])


def score_question(
    example: Example, system: System, row: Row | None, scorers: Mapping[str, Scorer]
) -> list[Score]:
    """Scores of one answer. A missing answer gives every metric a row without a value."""

    def score(metric: str, value: float | None, reason: str | None = None) -> Score:
        return Score(
            question_id=example.id, system=system, metric=metric, value=value, reason=reason
        )

    problem = None
    if row is None:
        problem = "the answers stage has no row for this question"
    elif row["answer"] is None:
        problem = row["error"] or "no answer"
    elif row["question"] != example.question:
        problem = "the question was asked in other words than the examples have"
    if row is None or problem:
        return [
            score(metric, None, problem) for metric in metrics_for(example, False, list(scorers))
        ]
    passages = {item["n"]: item["text"] for item in json.loads(row["passages"])}
    values = scoring.score_answer(
        row["answer"], answerable=example.answerable, reference=example.answer, passages=passages
    )
    scores = [score(metric, value) for metric, value in values.items()]
    if example.answerable and example.answer:
        for (
            name,
            scorer,
        ) in scorers.items():  # marks like "[2]" are no part of the sentence that they compare
            scores.append(
                guarded(score, name, scorer, example.answer, scoring.unmarked(row["answer"]))
            )
    return scores


def guarded(
    score: Callable[..., Score], name: str, scorer: Scorer, reference: str, response: str
) -> Score:
    """One foreign metric's score: what it raises, and what is no number in [0, 1], is INVALID."""
    try:
        value = float(scorer(reference, response))
    except Exception as error:  # a foreign library may raise anything; the reason is kept
        return score(name, None, f"{type(error).__name__}: {error}")
    if not math.isfinite(value) or not -1e-9 <= value <= 1 + 1e-9:
        return score(name, None, f"{value!r} is not a score between 0 and 1")
    return score(name, round(min(1.0, max(0.0, value)), 9))


def ragas_scorers(names: Sequence[str]) -> dict[str, Scorer]:
    """ragas metrics as plain functions (reference, response) → value. Importing ragas costs 7 CPU
    seconds and happens only when there is a name.

    Raises:
        ConfigError: a name that is not among :data:`RAGAS`.
    """
    import difflib

    unknown = [name for name in names if name not in RAGAS]
    if unknown:
        near = [
            f"{name}; did you mean {m[0]}?"
            if (m := difflib.get_close_matches(name, RAGAS, 1))
            else name
            for name in unknown
        ]
        raise ConfigError(
            "scorecard.ragas names metrics that are not known here.",
            offenders=near,
            where="params.yaml",
            next=f"known: {', '.join(RAGAS)}",
        )
    if not names:
        return {}
    from ragas.metrics import collections

    def scorer(name: str) -> Scorer:
        metric = getattr(collections, RAGAS[name])()
        return lambda reference, response: (
            asyncio.run(metric.ascore(reference=reference, response=response)).value
        )

    return {name: scorer(name) for name in names}


def summarise(scores: Sequence[Score], examples: Sequence[Example]) -> dict[str, Any]:
    """Means with intervals, counts and per-document means, and the questions that were asked."""
    documents = {example.id: example.document for example in examples}
    systems: dict[str, Any] = {}
    for system in SYSTEMS:
        names = sorted({item.metric for item in scores if item.system == system})
        systems[system] = {
            name: _metric(
                [item for item in scores if item.system == system and item.metric == name],
                documents,
            )
            for name in names
        }
    return {
        "questions": [
            {"id": e.id, "question": e.question, "document": e.document, "answerable": e.answerable}
            for e in sorted(examples, key=lambda e: e.id)
        ],
        "systems": systems,
        "invalid": sum(item.value is None for item in scores),
        "scores": len(scores),
        "interval": {
            "kind": "percentile bootstrap, 95 %, two-sided",
            "resamples": RESAMPLES,
            "seed": SEED,
        },
    }


def _metric(scores: Sequence[Score], documents: Mapping[str, str | None]) -> dict[str, Any]:
    """One metric of one system. A question without a document is a cluster of its own."""
    valid = [(item.question_id, item.value) for item in scores if item.value is not None]
    reasons = sorted({item.reason or "no reason given" for item in scores if item.value is None})
    result: dict[str, Any] = {
        "n": len(valid),
        "invalid": len(scores) - len(valid),
        "reasons": reasons[:5],
    }
    if not valid:
        return result | {"mean": None, "low": None, "high": None, "documents": {}}
    values = [value for _, value in valid]
    clusters = [documents[question] or question for question, _ in valid]
    by_document: dict[str, list[float]] = {}
    for question, value in valid:
        by_document.setdefault(documents[question] or "(unanswerable)", []).append(value)
    return (
        result
        | asdict(statistics.estimate(values, clusters, RESAMPLES, SEED))
        | {
            "documents": {
                name: {"mean": round(sum(items) / len(items), 6), "n": len(items)}
                for name, items in sorted(by_document.items())
            }
        }
    )


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """``candidate_answer_overlap`` … and the count of invalid scores. No value: no entry."""
    flat = {
        f"{system}_{name}": metric["mean"]
        for system, metrics in summary["systems"].items()
        for name, metric in metrics.items()
        if metric["mean"] is not None
    }
    return flat | {
        "invalid": float(summary["invalid"]),
        "questions": float(len(summary["questions"])),
    }


def report_lines(summary: Mapping[str, Any]) -> None:
    """The card, in a terminal."""
    for system, metrics in summary["systems"].items():
        for name, metric in metrics.items():
            value = (
                "none"
                if metric["mean"] is None
                else f"{metric['mean']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
            )
            invalid = f", {metric['invalid']} INVALID" if metric["invalid"] else ""
            harness.progress(f"scorecard: {system:9} {name:26} {value}  n={metric['n']}{invalid}")


if __name__ == "__main__":
    harness.main("scorecard", run, paths=("answers", "examples", "out"))
