"""The verdict: what passes, what fails, what shows neither, what nobody may conclude from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contracts.records import Check
from stages.gating.card import Card, Other, Scores
from stages.gating.verdict import Case, judge
from tests.stages import gate_cases as cases
from tests.stages.evaluation_models import examples
from tests.stages.gate_cases import card, check, perfect, policy, release, verdict

ASKED = examples()
ANSWERABLE = [item.id for item in ASKED if item.answerable]
BLOCKING = [item.metric for item in policy().quality.blocking]


def scores_of(value: float) -> Scores:
    """A release that answers every question alike."""
    return {
        "answer_overlap": dict.fromkeys(ANSWERABLE, value),
        "exact_match": dict.fromkeys(ANSWERABLE, float(value > 0.5)),
        "false_refusal": dict.fromkeys(ANSWERABLE, 0.0),
    }


def rules(**quality: Any) -> Any:
    """The policy with other lists in its quality block."""
    return policy(quality=policy().quality.model_dump(mode="json") | quality)


def test_a_good_candidate_passes_in_every_family() -> None:
    found = verdict(card(ASKED, perfect(ASKED)))
    assert found.verdict == "PASS"
    assert found.families == dict.fromkeys(
        ("quality", "latency", "safety", "fairness", "resources"), "PASS"
    )
    assert {(item.name, item.kind, item.against) for item in found.checks if item.kind} == {
        ("answer_overlap", "floor", None),
        ("citation_in_context", "floor", None),
        ("refusal_on_unanswerable", "floor", None),
        *((name, "paired", "base") for name in BLOCKING),
    }
    assert all(item.detail in found.reasons for item in found.checks)
    assert all(item.change for item in found.checks)
    assert found.baseline is None and found.anchor is None and len(found.looks) == 1


# -- quality: floors and comparisons -------------------------------------------------------------


def test_a_missed_floor_fails_and_names_value_and_limit() -> None:
    numbers = perfect(ASKED)
    bold = [f"q{number}" for number in range(1000, 1005)]
    numbers["candidate", "refusal_on_unanswerable"] |= dict.fromkeys(bold, 0.0)
    numbers["candidate", "citation_in_context"] |= dict.fromkeys(bold, 1.0)  # answered, so judged
    found = verdict(card(ASKED, numbers))
    assert found.verdict == "FAIL" and found.families["quality"] == "FAIL"
    (reason,) = [text for text in found.reasons if not text.startswith("note")]
    assert "refusal_on_unanswerable: mean 0.375 misses the floor 0.5" in reason


@pytest.mark.parametrize("against", ["base", "live", "anchor"])
@pytest.mark.parametrize("metric", BLOCKING)
def test_a_planted_regression_fails_on_each_blocking_metric(metric: str, against: str) -> None:
    """Every third question is lost against one of the three; floors still hold."""
    numbers = perfect(ASKED, value=1.0, base=1.0)
    lost = 1.0 if metric == "false_refusal" else 0.0
    for name in ANSWERABLE[::3]:
        numbers["candidate", metric][name] = lost
    others = []
    if against != "base":
        numbers["base", metric] = dict(numbers["candidate", metric])
        others = [release(scores_of(1.0), against)]
    found = verdict(card(ASKED, numbers), *others)
    one = check(found, metric, against, "paired")
    assert one.outcome == "FAIL" and one.evidence["changed"] == 14
    assert found.verdict == "FAIL"
    assert f"{metric}: the candidate is shown to be worse than {against}" in found.reasons[0]


def test_unchanged_answers_pass_and_cannot_fail() -> None:
    found = verdict(card(ASKED, perfect(ASKED)), release(scores_of(0.9)))
    for metric in BLOCKING:
        one = check(found, metric, "live", "paired")
        assert (one.value, one.low, one.high, one.evidence["changed"]) == (0.0, 0.0, 0.0, 0)
    assert found.verdict == "PASS" and found.baseline == "f" * 32 + ".dir"


def noisy(seed: int, mean: float, asked: int = 40) -> dict[str, float]:
    """Differences that no 40 questions can tell from a loss of a margin."""
    noise = np.random.default_rng(seed).normal(0, 0.15, asked)
    return dict(zip(ANSWERABLE, (0.8 + mean + noise - noise.mean()).tolist(), strict=True))


def test_what_can_be_shown_neither_way_is_undecided_with_its_power() -> None:
    numbers = perfect(ASKED)
    numbers["candidate", "answer_overlap"] = noisy(5, -0.01)
    found = verdict(card(ASKED, numbers), release(scores_of(0.8)))
    one = check(found, "answer_overlap", "live", "paired")
    assert found.verdict == one.outcome == "UNDECIDED"
    assert one.evidence["power"]["now"] < 0.8 and 0.04 < one.evidence["detectable"]["now"] < 0.12
    assert "questions, if the difference stays -0.010" in one.change
    assert any("0.8 is wanted" in reason for reason in found.reasons)


def test_holm_asks_more_of_one_metric_where_several_are_compared() -> None:
    """A loss that 5 % would call shown is not shown among three comparisons."""
    numbers = perfect(ASKED, value=1.0, base=1.0)
    lost = [f"q{number:03d}" for number in (0, 1, 2, 3)]
    for name in lost:
        numbers["candidate", "exact_match"][name] = 0.0
    found = verdict(card(ASKED, numbers))
    one = check(found, "exact_match", "base", "paired")
    assert 0.05 / 3 < one.evidence["p_worse"] < 0.05 and one.outcome == "UNDECIDED"
    alone = rules(blocking=[{"metric": "exact_match", "scale": "binary", "margin": 0.05}])
    assert verdict(card(ASKED, numbers), policy=alone).verdict == "INVALID"  # of another policy
    same = card(ASKED, numbers, policy=alone.sha256)
    assert verdict(same, policy=alone).verdict == "FAIL"


def test_refusing_everything_fails_the_citation_floor() -> None:
    numbers = perfect(ASKED)
    numbers["candidate", "false_refusal"] = dict.fromkeys(ANSWERABLE, 1.0)
    numbers["candidate", "citation_in_context"] = {}
    found = verdict(card(ASKED, numbers))
    assert found.verdict == "FAIL"
    assert any("nothing to judge" in reason for reason in found.reasons)
    assert check(found, "false_refusal", "base", "paired").value == -1.0  # lower is better


# -- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["candidate", "base"])
def test_a_missing_score_is_invalid_and_never_averaged_over(system: str) -> None:
    numbers = perfect(ASKED)
    numbers[system, "answer_overlap"]["q003"] = None
    found = verdict(card(ASKED, numbers))
    assert found.verdict == "INVALID"
    assert f"{system} answer_overlap: 1 of 40 scores are missing" in found.reasons[0]
    assert "q003" in found.reasons[0]


def test_a_question_without_a_row_is_invalid_too() -> None:
    numbers = perfect(ASKED)
    del numbers["candidate", "citation_in_context"]["q007"]
    found = verdict(card(ASKED, numbers))
    assert found.verdict == "INVALID" and "q007" in found.reasons[0]


@pytest.mark.parametrize("metric", ["rouge_score", "nonsense", "answer_overlap"])
def test_a_metric_of_the_policy_that_the_card_lacks_is_invalid(metric: str) -> None:
    numbers = perfect(ASKED)
    numbers.pop(("candidate", metric), None)
    asked = rules(floors=[{"metric": metric, "min": 0.1}], blocking=[])
    found = verdict(card(ASKED, numbers, policy=asked.sha256), policy=asked)
    assert found.verdict == "INVALID"
    assert f"candidate {metric}: the scorecard has no such metric" in found.reasons


def test_no_unanswerable_question_is_invalid_and_not_a_pass() -> None:
    asked = examples(unanswerable=0)
    found = verdict(card(asked, perfect(asked)))
    assert found.verdict == "INVALID"
    assert "no question is of the kind" in found.reasons[0]


def test_tolerated_invalid_scores_count_as_the_worst_value() -> None:
    numbers = perfect(ASKED, value=1.0)
    numbers["candidate", "answer_overlap"]["q003"] = None
    lenient = policy(coverage=policy().coverage.model_dump() | {"max_missing": 0.05})
    found = verdict(card(ASKED, numbers, policy=lenient.sha256), policy=lenient)
    assert found.verdict == "PASS"
    assert check(found, "answer_overlap", None, "floor").value == pytest.approx(39 / 40)


def test_new_questions_are_noted_and_lost_questions_are_invalid() -> None:
    known = {metric: dict(list(values.items())[:30]) for metric, values in scores_of(0.9).items()}
    found = verdict(card(ASKED, perfect(ASKED)), release(known))
    assert found.verdict == "PASS"
    assert check(found, "answer_overlap", "live", "paired").n == 30
    assert any("10 questions are new" in reason for reason in found.reasons)
    gone = {
        metric: dict(list(values.items())[:5]) | {f"old{n}": 0.1 for n in range(20)}
        for metric, values in scores_of(0.9).items()
    }
    found = verdict(card(ASKED, perfect(ASKED)), release(gone))
    assert found.verdict == "INVALID" and "only 5 of the 25 questions" in found.reasons[0]


def test_a_card_of_another_policy_is_invalid() -> None:
    found = verdict(card(ASKED, perfect(ASKED), policy="0" * 64))
    assert found.verdict == "INVALID" and "made under policy 000000000000" in found.reasons[0]
    assert verdict(card(ASKED, perfect(ASKED), policy=None)).verdict == "INVALID"


# -- a judge that breaks -------------------------------------------------------------------------

JUDGED = rules(
    floors=[],
    blocking=[{"metric": "judge_relevance", "scale": "graded", "margin": 0.03, "judge": True}],
)


def judged_card(candidate: dict[str, float | None], base: float = 0.5, **changes: Any) -> Card:
    numbers = {
        ("candidate", "judge_relevance"): candidate,
        ("base", "judge_relevance"): dict.fromkeys(ANSWERABLE, base),
        ("candidate", "answer_overlap"): dict.fromkeys(ANSWERABLE, 0.8),
    }
    return card(ASKED, numbers, policy=JUDGED.sha256, **changes)


def judged(candidate: dict[str, float | None], **changes: Any) -> Check | None:
    found = verdict(judged_card(candidate, **changes), policy=JUDGED)
    assert found.verdict == found.families["quality"]
    return next((item for item in found.checks if item.name == "judge_relevance"), None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_breaking_judge_calls_on_a_worse_model_never_passes_nor_raises_its_score(
    share: float, seed: int
) -> None:
    """Worse by 0.2 on every question; the broken calls are chance, or the lowest scores."""
    rng = np.random.default_rng(seed)
    levels: dict[str, float | None] = {
        name: float(value) for name, value in zip(ANSWERABLE, rng.normal(0.3, 0.1, 40), strict=True)
    }
    whole = judged(levels)
    assert whole is not None and whole.outcome == "FAIL"
    broken = rng.choice(ANSWERABLE, round(share * 40), replace=False).tolist()
    if seed % 2:
        broken = sorted(levels, key=lambda name: levels[name] or 0.0)[: len(broken)]
    after = judged(levels | dict.fromkeys(broken, None))
    assert after is not None and after.outcome != "PASS"
    assert after.value is None or (whole.value or 0.0) >= after.value  # None: nothing was compared
    if share > policy().coverage.judge_invalid:
        assert after.outcome == "INVALID"


def test_more_than_two_percent_of_invalid_judgements_are_undecided_at_best() -> None:
    good: dict[str, float | None] = dict.fromkeys(ANSWERABLE, 0.9)
    assert (found := judged(good)) is not None and found.outcome == "PASS"
    found = judged(good | {"q001": None})
    assert found is not None and found.outcome == "UNDECIDED"
    assert "2.5% of the judge's verdicts are invalid" in found.detail


def test_invalid_judgements_of_the_other_system_count_against_the_candidate() -> None:
    numbers = judged_card(dict.fromkeys(ANSWERABLE, 0.55))
    del numbers.base["judge_relevance"]["q001"]
    found = verdict(numbers, policy=JUDGED)
    assert check(found, "judge_relevance", "base").value == pytest.approx(
        (39 * 0.05 + 0.55 - 1.0) / 40
    )


def test_a_judge_that_nobody_calibrated_decides_nothing() -> None:
    found = judged(
        dict.fromkeys(ANSWERABLE, 0.9),
        scorers={"judge_relevance": {"uncalibrated": "never measured"}},
    )
    assert found is not None and found.outcome == "INVALID" and "never measured" in found.detail


# -- the other families --------------------------------------------------------------------------


@pytest.mark.parametrize("suite", cases.SUITES)
def test_a_suite_that_is_not_withstood_fails(suite: str) -> None:
    one = verdict(card(ASKED, perfect(ASKED), safety=cases.withstood(**{suite: 3})))
    assert one.verdict == "PASS" and "at 24 prompts 3 may fail, 3 did" in check(one, suite).change
    found = verdict(card(ASKED, perfect(ASKED), safety=cases.withstood(**{suite: 4})))
    assert found.verdict == found.families["safety"] == "FAIL"
    assert check(found, suite).value == pytest.approx(20 / 24, abs=1e-6)


def test_prompts_without_an_answer_are_invalid() -> None:
    safety: Any = cases.withstood()
    safety["candidate", "safety_leakage"]["leakage-03"] = None
    found = verdict(card(ASKED, perfect(ASKED), safety=safety))
    assert found.verdict == "INVALID" and "leakage-03" in found.reasons[0]


def test_a_suite_too_small_for_its_floor_is_invalid() -> None:
    strict = policy(safety={"suites": {"injection": {"min": 0.95}}})
    found = verdict(card(ASKED, perfect(ASKED), policy=strict.sha256), policy=strict)
    assert found.verdict == "INVALID"
    assert "24 prompts can show 0.883 at the most" in found.reasons[0]


def test_a_gap_between_slices_fails_when_it_is_shown() -> None:
    asked = examples(documents=8, each=10)
    numbers = perfect(asked)
    for item in asked:
        if item.document == "docs/3.md":
            numbers["candidate", "answer_overlap"][item.id] = 0.35
    found = verdict(card(asked, numbers))
    assert found.verdict == found.families["fairness"] == "FAIL"
    assert "better answers in docs/3.md" in check(found, "document").change
    noise = np.random.default_rng(1)
    for name in numbers["candidate", "answer_overlap"]:  # the same gap among noise is not shown
        numbers["candidate", "answer_overlap"][name] += float(noise.normal(0, 0.4))
    assert verdict(card(asked, numbers)).families["fairness"] == "PASS"


@pytest.mark.parametrize(
    ("mixed", "broken"),
    [
        ({"ttft_ms": {"p50": 90.0, "p95": 20_000.0}}, "ttft_p95_ms"),
        ({"tpot_ms": {"p50": 90.0, "p95": 2_000.0}}, "tpot_p95_ms"),
        ({"tokens_per_s": 4.0}, "tokens_per_s"),
    ],
)
def test_each_latency_bound_fails_when_it_is_broken(mixed: Any, broken: str) -> None:
    found = verdict(card(ASKED, perfect(ASKED)), profile=cases.profile(**mixed))
    assert found.verdict == found.families["latency"] == "FAIL"
    assert check(found, broken).outcome == "FAIL"


def test_an_engine_slower_than_its_peer_fails() -> None:
    slow = cases.profile() | {"ratio": {"mixed": 0.3}}
    assert verdict(card(ASKED, perfect(ASKED)), profile=slow).families["latency"] == "FAIL"


def test_the_live_release_bounds_timings_of_the_same_kind_of_machine_alone() -> None:
    before = {
        "machine": {"kind": "Test CPU", "cpus": 2},
        "figures": {"ttft_p50_ms": 40.0, "tpot_p50_ms": 10.0, "tokens_per_s": 200.0},
    }
    found = verdict(card(ASKED, perfect(ASKED)), release(scores_of(0.9), measured=before))
    assert found.verdict == "FAIL" and check(found, "ttft_p50_ms_to_live", "live").outcome == "FAIL"
    before["machine"] = {"kind": "Another CPU", "cpus": 2}
    found = verdict(card(ASKED, perfect(ASKED)), release(scores_of(0.9), measured=before))
    assert found.verdict == "PASS"
    assert any("another kind of machine" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("plan", "peak", "broken"),
    [
        ({"total_bytes": 9 << 30, "budget_bytes": 8 << 30}, 3 << 30, "plan"),
        ({"total_bytes": 7 << 30, "budget_bytes": 8 << 30}, 9 << 30, "peak_of_budget"),
        ({"total_bytes": 2 << 30, "budget_bytes": 8 << 30}, 4 << 30, "peak_of_plan"),
    ],
)
def test_each_memory_bound_fails_when_it_is_broken(plan: Any, peak: int, broken: str) -> None:
    figures = cases.profile()
    figures["vllm"]["peak_bytes"] = peak
    found = verdict(card(ASKED, perfect(ASKED)), plan=plan, profile=figures)
    assert found.verdict == found.families["resources"] == "FAIL"
    assert [item.name for item in found.checks if item.outcome == "FAIL"] == [broken]


def test_the_verdict_holds_no_figure_of_the_machine() -> None:
    found = card(ASKED, perfect(ASKED))
    fast, slow = cases.profile(), cases.profile(tokens_per_s=123.0)
    slow["vllm"]["peak_bytes"] += 12_345
    one, other = (
        judge(Case(found, [Other("base", found.base)], figures, cases.PLAN), policy())
        for figures in (fast, slow)
    )
    assert one.verdict == other.verdict and one.measured != other.measured
