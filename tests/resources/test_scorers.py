"""resources.scorers: items in, scores out, whoever scores; and what a broken judge does to them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judge_server import JudgeServer
from contracts.errors import ConfigError
from contracts.params import Judge
from contracts.records import REFUSAL, Example, RequestRecord
from contracts.settings import Settings
from resources.judging import rubric
from resources.judging.calibration import Calibration, write_store
from resources.judging.judge import Endpoint
from resources.scorers import deterministic, live
from resources.scorers.deterministic_scorer import DeterministicScorer
from resources.scorers.judge_scorer import JudgeScorer
from resources.scorers.scorer import Item, Score
from stages import online_eval, scorecard
from stages.gating.card import Other, card_of
from stages.gating.quality import Look, compare
from tests.stages.gate_cases import policy

CACHE = "The cache is content-addressed."
CHUNKS = {"docs:a#0-30": CACHE, "docs:b#0-30": "Rollback flips one pointer."}
ITEM = Item("q1", "How?", f"{CACHE} [1]", {1: CACHE}, reference=CACHE, answerable=True)


def by_metric(scores: list[Score]) -> dict[str, float | None]:
    return {score.metric: score.value for score in scores}


def record(**changes: Any) -> RequestRecord:
    """A row of the request log: answered from both chunks, citing the first."""
    fields: dict[str, Any] = {
        "response_id": "r1",
        "time": "2026-11-20T10:00:00Z",
        "channel": "stable",
        "release": "rel",
        "model": "m",
        "prompt_version": "v1",
        "question": "How?",
        "answer": f"{CACHE} [1]",
        "refused": False,
        "stream": False,
        "status": 200,
        "error": None,
        "chunk_ids": list(CHUNKS),
        "cited": [1],
        "scores": [0.9, 0.8],
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "ttft_ms": None,
        "latency_ms": 5.0,
        "retrieval_ms": 1.0,
    }
    return RequestRecord.model_validate(fields | changes)


# -- deterministic, offline and live -------------------------------------------------------------


def test_the_scorer_gives_what_the_functions_give() -> None:
    answers = [f"{CACHE} [1]", f"{CACHE} [2]", "Magic.", REFUSAL, f"{REFUSAL} [1]"]
    items = [replace(ITEM, answer=answer) for answer in answers]
    items += [replace(item, reference=None, answerable=False) for item in items]
    scorer = DeterministicScorer()
    for item, scores in zip(items, scorer.score(items), strict=True):
        want = deterministic.score_answer(
            item.answer,
            answerable=bool(item.answerable),
            reference=item.reference,
            passages=item.passages,
        )
        assert by_metric(scores) == want
        assert all(score.uncalibrated is None and score.item == "q1" for score in scores)
        assert list(want) and set(want) == set(scorer.applies(item))


def test_an_answer_that_is_missing_has_every_score_it_would_have_had() -> None:
    (scores,) = DeterministicScorer().score([replace(ITEM, answer="", problem="the model died")])
    assert {score.metric for score in scores} == {
        name for name, applies in deterministic.METRICS.items() if applies != "unanswerable"
    }
    assert all(score.value is None and score.reason == "the model died" for score in scores)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {"refusal": 0.0, "citation_in_context": 1.0, "grounded": 1.0}),
        ({"answer": f"{CACHE} [2]"}, {"refusal": 0.0, "citation_in_context": 0.0, "grounded": 1.0}),
        ({"answer": "Magic."}, {"refusal": 0.0, "citation_in_context": 0.0, "grounded": 0.0}),
        ({"answer": REFUSAL, "refused": True}, {"refusal": 1.0}),
        ({"answer": REFUSAL}, {"refusal": 1.0}),
        ({"answer": REFUSAL, "chunk_ids": ["gone"]}, {"refusal": 1.0}),
        (
            {"chunk_ids": ["docs:a#0-30", "gone"]},
            {"refusal": 0.0, "citation_in_context": None, "grounded": None},
        ),
        ({"error": "engine gone", "status": 200}, {}),
        ({"status": 503}, {}),
        ({"release": ""}, {}),  # a plain model cites nothing
        ({"chunk_ids": [], "answer": "A"}, {"refusal": 0, "citation_in_context": 0, "grounded": 0}),
    ],
)
def test_live_traffic(changes: dict[str, Any], want: dict[str, float | None]) -> None:
    scores = live.score_record(record(**changes), CHUNKS)
    assert by_metric(scores) == want
    assert all(score.item == "r1" and score.scorer == "deterministic" for score in scores)
    for score in scores:
        assert score.value is not None or "1 of 2 passages" in (score.reason or "")


def test_a_score_has_a_value_or_a_reason() -> None:
    with pytest.raises(ValueError, match="either"):
        Score("i", "m", None, None, "s", "v")
    with pytest.raises(ValueError, match="either"):
        Score("i", "m", 1.0, "why", "s", "v")


# -- a judge -------------------------------------------------------------------------------------


def gives(score: int) -> Any:
    return lambda _: {"evidence": "e", "score": score}


def calibration(version: str, low: float = 0.7, served: str = "recorded") -> Calibration:
    whole = {"value": 0.8, "low": low, "high": 0.9}
    fields = {"version": version, "form": "f", "model": "m", "served": [served], "labels": "0"}
    fields |= {"n": 100, "right": whole, "accuracy": 0.9, "kappa": whole, "invalid": {}}
    return Calibration.model_validate(fields | {"confusion": {}})


def trusted(*criteria: str, **more: Any) -> dict[str, Calibration]:
    versions = [rubric.form(name).version("m") for name in criteria]
    return {version: calibration(version, **more) for version in versions}


def scorer(server: JudgeServer, *criteria: str, **more: Any) -> JudgeScorer:
    known = more.pop("known", trusted(*criteria))
    endpoint = Endpoint(server.url, "m", deadline=2.0)
    return JudgeScorer(endpoint, criteria, known, 0.4, more.pop("caches", None))


def test_a_judge_scores_each_criterion() -> None:
    with JudgeServer(lambda shown: gives(4 if "passages" in shown else 2)(shown)) as server:
        (scores,) = scorer(server, "groundedness", "relevance").score([ITEM])
    assert by_metric(scores) == {"judge_groundedness": 0.75, "judge_relevance": 0.25}
    assert {score.uncalibrated for score in scores} == {None}
    assert len({score.version for score in scores}) == 2


def test_refusals_are_not_shown_to_the_judge() -> None:
    """Of an answerable question one is worth 0: refusing everything must not look good."""
    refused = replace(ITEM, answer=REFUSAL)
    items = [refused, replace(refused, answerable=False), replace(refused, answerable=None)]
    with JudgeServer(gives(5)) as server:
        found = scorer(server, "relevance").score(items)
        assert not server.bodies
    assert [by_metric(scores) for scores in found] == [{"judge_relevance": 0.0}, {}, {}]


def test_what_cannot_be_judged_is_invalid_or_does_not_apply() -> None:
    items = [
        replace(ITEM, reference=None),
        replace(ITEM, passages={}, lost="1 of 1 passages are gone"),
        replace(ITEM, answer="", passages={}, problem="no answer"),
    ]
    with JudgeServer(gives(5)) as server:
        found = scorer(server, "groundedness", "correctness").score(items)
    assert by_metric(found[0]) == {"judge_groundedness": 1.0}
    assert by_metric(found[1]) == {"judge_groundedness": None, "judge_correctness": 1.0}
    assert by_metric(found[2]) == {"judge_groundedness": None, "judge_correctness": None}


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({}, "nobody has compared"),
        (trusted("relevance", low=0.3), "not shown to reach 0.4"),
        (trusted("groundedness"), "nobody has compared"),  # another criterion is another judge
        (trusted("relevance", served="m-0613"), "answered by recorded"),
        ({"old": calibration("old")}, "nobody has compared"),
    ],
)
def test_a_judge_that_nobody_measured_decides_nothing(
    known: dict[str, Calibration], told: str
) -> None:
    with JudgeServer(gives(5)) as server:
        ((score,),) = scorer(server, "relevance", known=known).score([ITEM])
    assert score.value == 1.0 and told in (score.uncalibrated or "")


def test_the_judge_of_params_needs_an_address(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="JUDGE_URL"):
        JudgeScorer.of(Judge(model="m"), settings.root / "judges.json", settings)


# -- a third of the judge's calls broken ---------------------------------------------------------


def asked(count: int) -> list[Example]:
    fields = {"split": "test", "section": "s", "passages": None, "answerable": True}
    return [
        Example.model_validate(
            {"id": f"q{n:03d}", "question": f"Q{n}?", "document": f"d{n % 7}", "answer": CACHE}
            | fields
        )
        for n in range(count)
    ]


def answers(examples: list[Example], quality: int) -> dict[tuple[str, str], Any]:
    """Both systems' rows; the candidate's answer holds the judge's score for it (5, or less)."""
    chance = random.Random(3)
    rows = {}
    for example in examples:
        own = str(max(1, 5 - chance.randint(0, quality)))
        for system, text in (("candidate", own), ("base", "5")):
            passages = json.dumps([{"n": 1, "text": CACHE}])
            rows[example.id, system] = {
                "question": example.question,
                "answer": text,
                "passages": passages,
                "error": None,
            }
    return rows


def scored(
    breaks: Any, quality: int = 3, criteria: tuple[str, ...] = ("relevance",)
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Rows, summary and facts of a card. ``breaks``: material -> a fault, or None; ``criteria``:
    those that the judge is calibrated for."""

    def answer(shown: Mapping[str, Any]) -> dict[str, Any] | str:
        return breaks(shown) or {"evidence": "e", "score": int(shown["answer"])}

    examples = asked(60)
    with JudgeServer(answer) as server:
        judge = scorer(server, "relevance", known=trusted(*criteria))
        rows, facts = scorecard.score_all(examples, answers(examples, quality), [judge])
    return rows, scorecard.summarise(rows, examples), facts


def card(breaks: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The judged metric's summary and facts."""
    _, summary, facts = scored(breaks)
    return summary["systems"]["candidate"]["judge_relevance"], facts["judge_relevance"]


WAYS = ("hang", "garbage", "refusal", "truncated")


def at_random(shown: Mapping[str, Any]) -> str | None:
    chance = random.Random(f"{sorted(shown.items())}")
    return chance.choice(WAYS) if chance.random() < 0.3 else None


def on_bad_answers(shown: Mapping[str, Any]) -> str | None:
    """The worst case: the judge fails exactly where the answer is bad."""
    return "garbage" if int(shown["answer"]) <= 2 else None


@pytest.mark.parametrize("breaks", [at_random, on_bad_answers])
def test_broken_calls_never_raise_a_score(breaks: Any) -> None:
    whole, facts = card(lambda _: None)
    assert whole["coverage"] == 1.0 and whole["worst_case"] == whole["mean"]
    assert facts["uncalibrated"] is None and facts["calibration"]["kappa"]["low"] == 0.7
    broken, _ = card(breaks)
    assert 0.5 < broken["coverage"] < 0.85 and broken["invalid"] == 60 - broken["n"]
    assert broken["worst_case"] < whole["mean"]
    assert broken["reasons"]


def test_the_plain_mean_would_rise_which_is_why_it_is_not_the_one_that_counts() -> None:
    assert card(on_bad_answers)[0]["mean"] > card(lambda _: None)[0]["mean"]


def gate(*given: Any, **more: Any) -> str:
    """What the gate says of the judged metric against the base model."""
    rows, summary, facts = scored(*given, **more)
    found = card_of(rows, summary | {"scorers": facts})
    asks = {"metric": "judge_relevance", "scale": "graded", "margin": 0.03, "judge": True}
    rules = policy(quality={"blocking": [asks], "floors": []})
    (check,) = compare(found, [Other("base", found.base)], rules, Look(0, (60,))).checks
    return check.outcome


def test_the_gate_over_a_judge_that_breaks_and_one_that_nobody_measured() -> None:
    """From the wire to the verdict: the candidate is worse (quality 3), or as good as base (0)."""

    def whole(_: Mapping[str, Any]) -> None:
        """Nothing breaks."""

    def garbled(shown: Mapping[str, Any]) -> str | None:
        return "garbage" if at_random(shown) else None

    assert gate(whole, quality=0) == "PASS"
    assert gate(whole) == "FAIL"
    assert gate(garbled) == gate(on_bad_answers) == "INVALID"
    assert gate(garbled, quality=0) == "INVALID"
    assert gate(whole, quality=0, criteria=()) == "INVALID"


# -- the nightly run -----------------------------------------------------------------------------


def night(count: int) -> list[dict[str, Any]]:
    rows = [record(response_id=f"r{n}", question=f"Q{n}?").model_dump() for n in range(count)]
    return [*rows, record(response_id="x", answer=REFUSAL).model_dump()]


def judged_night(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, answer: Any, known: Any, count: int = 10
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    judges = settings.root / "judges.json"
    write_store(judges, known)
    items = online_eval.sample(night(40), {"rel": CHUNKS}, count)
    with JudgeServer(answer) as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        found = online_eval.judge_sample(items, Judge(model="m"), judges)
    return found, server.bodies


def test_a_night_is_sampled_the_same_in_any_order() -> None:
    rows = night(40)
    first = online_eval.sample(rows, {"rel": CHUNKS}, 10)
    assert first == online_eval.sample(rows[::-1], {"rel": CHUNKS}, 10)
    assert len({item.id for item in first}) == 10 and "x" not in {item.id for item in first}
    assert [item.id for item in first] != [f"r{n}" for n in range(10)]
    assert len(online_eval.sample(rows, {"rel": CHUNKS}, 100)) == 40


def test_a_calibrated_judge_scores_a_sample_of_the_night(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, bodies = judged_night(
        settings, monkeypatch, gives(5), trusted("groundedness", "relevance")
    )
    assert found["sampled"] == 10 and found["skipped"] == {} and len(bodies) == 20
    assert found["metrics"]["judge_relevance"]["worst_case"] == 1.0
    found, _ = judged_night(
        settings,
        monkeypatch,
        lambda shown: "garbage" if "passages" in shown else gives(4)(shown),
        trusted("groundedness", "relevance"),
        count=12,
    )
    grounded = found["metrics"]["judge_groundedness"]
    # Ten of the twelve are the answers of before: they come from the cache.
    assert (grounded["n"], grounded["invalid"], grounded["reasons"]) == (10, 2, {"unparseable": 2})
    assert grounded["worst_case"] == round(10 / 12, 6) and grounded["mean"] == 1.0


def test_a_judge_that_nobody_measured_is_not_asked_at_night(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, bodies = judged_night(settings, monkeypatch, gives(5), trusted("relevance"))
    assert set(found["metrics"]) == {"judge_relevance"} and len(bodies) == 10
    assert "nobody" in found["skipped"]["judge_groundedness"]
    found, bodies = judged_night(settings, monkeypatch, gives(5), {})
    assert found["metrics"] == {} and not bodies


def test_scores_of_another_model_behind_the_name_do_not_count_at_night(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = trusted("relevance", served="m-0613")
    found, _ = judged_night(settings, monkeypatch, gives(5), known)
    relevance = found["metrics"]["judge_relevance"]
    assert (relevance["n"], relevance["mean"]) == (0, None)
    assert relevance["reasons"] == {"uncalibrated": 10} and relevance["worst_case"] == 0.0


def test_a_night_without_the_judges_address_keeps_its_other_numbers(
    settings: Settings, tmp_path: Path
) -> None:
    items = online_eval.sample(night(3), {"rel": CHUNKS}, 10)
    found = online_eval.judge_sample(items, Judge(model="m"), tmp_path / "judges.json")
    assert found["sampled"] == 0 and "not set" in found["skipped"]["judge"]
