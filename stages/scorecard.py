"""Stage ``scorecard``: every answer scored, question by question.

In: ``answers.parquet`` and ``examples/test.jsonl`` (which questions there must be). Out: a folder
with ``scores.parquet`` (rows of ``contracts.records.Score``) and ``summary.json`` (means with
intervals, counts of invalid scores, overall and per document; written last).

The metrics of ``resources.scorers.deterministic`` need no model; ragas' and a judge's are added
where params.yaml says so (``resources.scorers``). A score that could not be computed keeps its row,
with no value and the reason. Means are over what has a value and always stand beside the number
that has none; the gate refuses to judge such a card. A metric that does not apply to a question (a
citation, where the answer is a refusal) has no row at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.params import Params
from contracts.policy import load_policy
from contracts.records import Example, Score
from contracts.settings import Settings
from resources.scorers import deterministic
from resources.scorers.deterministic_scorer import DeterministicScorer
from resources.scorers.judge_scorer import JudgeScorer
from resources.scorers.scorer import Item, Scorer
from resources.scorers.scorer import Score as ItemScore
from stages import harness, statistics, tables
from stages.evidence import SYSTEMS, System, read_examples, read_safety, write_scores
from stages.safety import listed, score_safety

RESAMPLES, SEED = 2000, 7
Row = Mapping[str, Any]


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``; metrics are ``<system>_<metric>`` means and ``invalid``."""
    out = harness.fresh_dir(paths.out)
    policy = load_policy(paths.policy)
    # Before anything is scored: the gate refuses a card that was made under another policy.
    harness.write_json(out / "policy.json", {"sha256": policy.sha256})
    examples = read_examples(paths.examples / "test.jsonl")
    prompts = read_safety(paths.safety)
    answers = read_answers(paths.answers)
    scores, facts = score_all(examples, answers, scorers_of(params, paths.judges))
    safety = score_safety(prompts, answers)
    summary = summarise(scores, examples, safety)
    summary |= {"scorers": facts, "policy": policy.sha256, "safety": listed(prompts)}
    write_scores([*scores, *safety], out / "scores.parquet")
    harness.write_json(out / "summary.json", summary)
    report_lines(summary)
    return flat_metrics(summary)


def read_answers(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of answers.parquet by question and system. Raises InputError for a doubled row."""
    columns = ["question_id", "system", "question", "passages", "messages", "answer", "error"]
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


def scorers_of(params: Params, judges: Path) -> list[Scorer]:
    """The scorers that params.yaml asks for. ``judges``: what their judgement is known to be worth.

    Raises:
        ConfigError: an unknown metric, or a judge without an address.
    """
    from resources.judging.judge import cache_folder, endpoint_of
    from resources.scorers.ragas_scorer import RagasScorer

    settings, judge = Settings.from_env(), params.scorecard.judge
    found: list[Scorer] = [DeterministicScorer()]
    if params.scorecard.ragas:
        endpoint = endpoint_of(judge.model, settings) if judge else None
        embed = partial(_embed, params, settings)
        found.append(RagasScorer(params.scorecard.ragas, endpoint, cache_folder(settings), embed))
    if judge:
        found.append(JudgeScorer.of(judge, judges, settings))
    return found


def _embed(params: Params, settings: Settings, texts: Sequence[str]) -> list[list[float]]:
    from resources.embedding import open_embedder

    embedder = open_embedder(params.vectors, settings.embeddings_dir, threads=1, device="cpu")
    vectors: list[list[float]] = embedder.embed_questions(texts).tolist()
    return vectors


def score_all(
    examples: Sequence[Example],
    answers: Mapping[tuple[str, str], Row],
    scorers: Sequence[Scorer],
    systems: Sequence[System] = SYSTEMS,
) -> tuple[list[Score], dict[str, Any]]:
    """Every score there must be, and of each metric who gave it.

    Returns:
        (rows, metric -> ``scorer``, ``version``, ``uncalibrated``: why it may neither block nor
        pass anything, None where it may, ``calibration``: of the judge that gave it).
    """
    asked = [(example, system) for system in systems for example in examples]
    items = [item_of(example, answers.get((example.id, system))) for example, system in asked]
    facts: dict[str, Any] = {}
    rows: list[Score] = []
    for scorer in scorers:
        for (_, system), scores in zip(asked, scorer.score(items), strict=True):
            rows += [row_of(score, system) for score in scores]
            note(facts, scores, scorer)
    return rows, facts


def row_of(score: ItemScore, system: System) -> Score:
    return Score(
        question_id=score.item,
        system=system,
        metric=score.metric,
        value=score.value,
        reason=score.reason,
    )


def note(facts: dict[str, Any], scores: Sequence[ItemScore], scorer: Scorer) -> None:
    """Keep in ``facts`` what is known of each metric, not of one answer."""
    for score in scores:
        fact = facts.setdefault(score.metric, {"uncalibrated": None, "calibration": None})
        fact |= {"scorer": score.scorer, "version": score.version}
        fact["uncalibrated"] = fact["uncalibrated"] or score.uncalibrated
        if isinstance(scorer, JudgeScorer) and (known := scorer.calibration(score.metric)):
            fact["calibration"] = known.model_dump()


def item_of(example: Example, row: Row | None) -> Item:
    """The answer to score. One that is missing has a ``problem`` and no text: no refusal."""
    item = Item(
        example.id, example.question, "", reference=example.answer, answerable=example.answerable
    )
    if row is None:
        return replace(item, problem="the answers stage has no row for this question")
    if row["answer"] is None:
        return replace(item, problem=row["error"] or "no answer")
    if row["question"] != example.question:
        problem = "the question was asked in other words than the examples have"
        return replace(item, problem=problem)
    passages = {shown["n"]: shown["text"] for shown in json.loads(row["passages"])}
    return replace(item, answer=row["answer"], passages=passages)


def summarise(
    scores: Sequence[Score], examples: Sequence[Example], safety: Sequence[Score] = ()
) -> dict[str, Any]:
    """Means with intervals, counts and per-document means, and the questions that were asked."""
    scores = [*scores, *safety]
    documents = {example.id: example.document for example in examples}
    documents |= {item.question_id: None for item in safety}
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
        "questions": [question_of(e) for e in sorted(examples, key=lambda e: e.id)],
        "systems": systems,
        "invalid": sum(item.value is None for item in scores),
        "scores": len(scores),
        "interval": {
            "kind": "percentile bootstrap, 95 %, two-sided",
            "resamples": RESAMPLES,
            "seed": SEED,
        },
    }


def question_of(example: Example) -> dict[str, Any]:
    """A question as the summary lists it."""
    return {key: getattr(example, key) for key in ("id", "question", "document", "answerable")}


def _metric(scores: Sequence[Score], documents: Mapping[str, str | None]) -> dict[str, Any]:
    """One metric of one system. A question without a document is a cluster of its own.

    ``mean`` is over what has a value, and may rise when bad answers fail to be scored; with
    ``worst_case`` each of those counts as the worst there is, so it cannot.
    """
    valid = [(item.question_id, item.value) for item in scores if item.value is not None]
    reasons = sorted({item.reason or "no reason given" for item in scores if item.value is None})
    worst = float(scores[0].metric in deterministic.LOWER_IS_BETTER)
    total = sum(value for _, value in valid) + worst * (len(scores) - len(valid))
    result: dict[str, Any] = {
        "n": len(valid),
        "invalid": len(scores) - len(valid),
        "coverage": round(len(valid) / len(scores), 6),
        "worst_case": round(total / len(scores), 6),
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
    harness.main(
        "scorecard", run, paths=("answers", "examples", "safety", "judges", "policy", "out")
    )
