"""stages.gate: what passes, what fails, what nobody may conclude from, and the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.digests import path_md5
from contracts.errors import GateError, InputError
from contracts.records import Score, Verdict
from contracts.settings import Settings
from stages import evidence, gate, harness, scorecard
from tests.stages.evaluation_models import card, examples, params, perfect, policy

ASKED = examples()
ANSWERABLE = [item.id for item in ASKED if item.answerable]


def stable_of(values: dict[str, float], metric: str = "answer_overlap") -> dict[str, Any]:
    """A stable release that scored ``values``; the same on exact match."""
    scores = {name: {metric: value, "exact_match": 1.0} for name, value in values.items()}
    return {"release": "0123456789abcdef", "scorecard": "f" * 32 + ".dir", "scores": scores}


def judge(numbers: Any, stable: Any = None, **changes: Any) -> Verdict:
    return gate.judge(card(ASKED, numbers), stable, policy(**changes))


def check(verdict: Verdict, name: str, kind: str) -> dict[str, Any]:
    (found,) = [item for item in verdict.checks if (item["name"], item["kind"]) == (name, kind)]
    return found


def test_a_good_candidate_passes_and_every_check_is_a_reason() -> None:
    verdict = judge(perfect(ASKED))
    assert verdict.verdict == "PASS"
    assert verdict.baseline is None
    assert [(item["name"], item["kind"]) for item in verdict.checks] == [
        ("answer_overlap", "floor"),
        ("citation_in_context", "floor"),
        ("refusal_on_unanswerable", "floor"),
        ("answer_overlap", "paired_base"),
        ("exact_match", "paired_base"),
    ]
    assert all(item["detail"] in verdict.reasons for item in verdict.checks)


def test_a_missed_floor_fails_and_names_value_and_limit() -> None:
    numbers = perfect(ASKED)
    bold = [f"q{number}" for number in range(1000, 1005)]
    numbers["candidate", "refusal_on_unanswerable"] |= dict.fromkeys(bold, 0.0)
    numbers["candidate", "citation_in_context"] |= dict.fromkeys(bold, 1.0)  # answered, so judged
    verdict = judge(numbers)
    assert verdict.verdict == "FAIL"
    (reason,) = verdict.reasons
    assert "refusal_on_unanswerable: mean 0.375 misses the floor 0.5" in reason


@pytest.mark.parametrize("metric", ["answer_overlap", "exact_match"])
def test_a_planted_regression_fails_on_each_paired_metric(metric: str) -> None:
    """Every third question is lost against the stable release; floors still hold."""
    numbers = perfect(ASKED, value=1.0)
    for name in ANSWERABLE[::3]:
        numbers["candidate", metric][name] = 0.0
    scores = {name: {"answer_overlap": 1.0, "exact_match": 1.0} for name in ANSWERABLE}
    stable = {"release": "0" * 16, "scorecard": "x", "scores": scores}
    verdict = judge(numbers, stable)
    assert verdict.verdict == "FAIL"
    assert check(verdict, metric, "paired_stable")["passed"] is False
    assert check(verdict, metric, "paired_stable")["changed"] == 14
    assert f"{metric}: candidate is worse than stable" in verdict.reasons[0]


def test_a_candidate_worse_than_its_own_base_fails() -> None:
    verdict = judge(perfect(ASKED, value=0.8, base=0.95))
    assert verdict.verdict == "FAIL"
    assert "worse than base" in verdict.reasons[0]


def test_unchanged_answers_cannot_fail() -> None:
    numbers = perfect(ASKED, value=0.9)
    verdict = judge(numbers, stable_of(dict.fromkeys(ANSWERABLE, 0.9)))
    assert verdict.verdict == "PASS"
    found = check(verdict, "answer_overlap", "paired_stable")
    assert (found["value"], found["low"], found["high"], found["changed"]) == (0.0, 0.0, 0.0, 0)
    assert found["non_inferior"] is True
    assert verdict.baseline == "f" * 32 + ".dir"


def test_a_loss_that_is_not_shown_passes_with_a_note_about_power() -> None:
    rng = np.random.default_rng(5)
    numbers = perfect(ASKED)
    noise = rng.normal(0, 0.15, len(ANSWERABLE))
    levels = dict(zip(ANSWERABLE, (0.79 + noise - noise.mean()).tolist(), strict=True))
    numbers["candidate", "answer_overlap"] = levels
    verdict = judge(numbers, stable_of(dict.fromkeys(ANSWERABLE, 0.8)))
    found = check(verdict, "answer_overlap", "paired_stable")
    assert verdict.verdict == "PASS"
    assert found["non_inferior"] is False and 0.02 < found["detectable"] < 0.2
    assert any("is noticed in four of five cases" in reason for reason in verdict.reasons)


def test_equal_candidates_are_blocked_about_one_time_in_twenty() -> None:
    """400 comparisons of two systems of equal quality, over 20 documents with luck of their own."""
    rng = np.random.default_rng(11)
    asked = examples(documents=20, each=5, unanswerable=1)
    names = [item.id for item in asked if item.answerable]
    bench_policy = policy(resamples=300)
    blocked = 0
    for _ in range(400):
        luck = {f"docs/{number}.md": rng.normal(0, 0.05) for number in range(20)}
        bench = gate.Bench()
        documents = {item.id: item.document for item in asked}
        mine = {name: float(rng.normal(0, 0.2) + luck[str(documents[name])]) for name in names}
        gate._paired(
            CARD20, "stable", "answer_overlap", mine, dict.fromkeys(names, 0.0), bench_policy, bench
        )
        blocked += not bench.checks[0]["passed"]
    assert 8 <= blocked <= 40  # 2 to 10 %


CARD20 = card(examples(documents=20, each=5, unanswerable=1), {})


@pytest.mark.parametrize("system", ["candidate", "base"])
def test_a_missing_score_is_invalid_and_never_averaged_over(system: str) -> None:
    numbers = perfect(ASKED)
    numbers[system, "answer_overlap"]["q003"] = None
    verdict = judge(numbers)
    assert verdict.verdict == "INVALID"
    assert f"{system} answer_overlap: 1 of 40 scores are missing" in verdict.reasons[0]
    assert "q003" in verdict.reasons[0]


def test_a_question_without_a_row_is_invalid_too() -> None:
    numbers = perfect(ASKED)
    del numbers["candidate", "citation_in_context"]["q007"]
    verdict = judge(numbers)
    assert verdict.verdict == "INVALID"
    assert "q007" in verdict.reasons[0]


@pytest.mark.parametrize("metric", ["rouge_score", "nonsense", "answer_overlap"])
def test_a_metric_of_the_policy_that_the_card_lacks_is_invalid(metric: str) -> None:
    numbers = perfect(ASKED)
    numbers.pop(("candidate", metric), None)
    verdict = judge(numbers, floors=[{"metric": metric, "min": 0.1}], paired=[])
    assert verdict.verdict == "INVALID"
    assert f"candidate {metric}: the scorecard has no such metric" in verdict.reasons


def test_no_unanswerable_question_is_invalid_and_not_a_pass() -> None:
    asked = examples(unanswerable=0)
    verdict = gate.judge(card(asked, perfect(asked)), None, policy())
    assert verdict.verdict == "INVALID"
    assert "no test question is of the kind" in verdict.reasons[0]


def test_tolerated_invalid_scores_count_as_the_worst_value() -> None:
    numbers = perfect(ASKED, value=1.0)
    numbers["candidate", "answer_overlap"]["q003"] = None
    verdict = judge(numbers, max_invalid=0.05)
    assert verdict.verdict == "PASS"
    assert check(verdict, "answer_overlap", "floor")["value"] == pytest.approx(39 / 40)


def test_refusing_everything_fails_the_citation_floor() -> None:
    numbers = perfect(ASKED)
    numbers["candidate", "false_refusal"] = dict.fromkeys(ANSWERABLE, 1.0)
    numbers["candidate", "citation_in_context"] = {}
    verdict = judge(numbers)
    assert verdict.verdict == "FAIL"
    assert "nothing to judge" in verdict.reasons[0]


def test_new_questions_are_noted_and_lost_questions_are_invalid() -> None:
    known = dict.fromkeys(ANSWERABLE[:30], 0.9)
    verdict = judge(perfect(ASKED), stable_of(known))
    assert verdict.verdict == "PASS"
    assert check(verdict, "answer_overlap", "paired_stable")["n"] == 30
    assert any("10 questions are new" in reason for reason in verdict.reasons)
    gone = dict.fromkeys(ANSWERABLE[:5], 0.9) | {f"old{n}": 0.1 for n in range(20)}
    verdict = judge(perfect(ASKED), stable_of(gone))
    assert verdict.verdict == "INVALID"
    assert "only 5 of the 25 questions" in verdict.reasons[0]


def test_lower_is_better_turns_the_sign() -> None:
    numbers = perfect(ASKED)
    numbers["candidate", "false_refusal"] = dict.fromkeys(ANSWERABLE, 1.0)
    numbers["candidate", "citation_in_context"] = {}
    verdict = judge(numbers, floors=[], paired=["false_refusal"])
    assert check(verdict, "false_refusal", "paired_base")["value"] == -1.0
    assert verdict.verdict == "FAIL"


# -- files -------------------------------------------------------------------------------------


def write_card(folder: Path, numbers: Any) -> Path:
    """A scorecard folder as the stage writes it."""
    scores = [
        Score(question_id=name, system=system, metric=metric, value=value)
        for (system, metric), values in numbers.items()
        for name, value in values.items()
    ]
    folder.mkdir(parents=True)
    evidence.write_scores(scores, folder / "scores.parquet")
    harness.write_json(folder / "summary.json", scorecard.summarise(scores, ASKED))
    return folder


def run(tmp_path: Path, stable: Any, out: str, name: str = "card", **numbers: Any) -> Path:
    """Run the stage on a passing card and give its folder."""
    folder = tmp_path / name
    if not folder.exists():
        write_card(folder, perfect(ASKED, **numbers))
    file = tmp_path / f"{out}-stable.json"
    file.write_text(json.dumps(stable))
    paths = SimpleNamespace(scorecard=folder, stable=file, out=tmp_path / out)
    gate.run(paths, params())
    return tmp_path / out


def test_deploying_a_release_does_not_change_its_own_verdict(tmp_path: Path) -> None:
    """Stable is the candidate itself: every byte is as if there were no stable release."""
    first = run(tmp_path, {"release": None}, "first")
    own = tmp_path / "card"
    baseline = gate.baseline_from_scorecard(own / "scores.parquet", "a" * 16, path_md5(own))
    second = run(tmp_path, baseline, "second")
    assert path_md5(first) == path_md5(second)
    # And a baseline with other scores does change it, so the equality above is no accident.
    third = run(tmp_path, baseline | {"scorecard": "other"}, "third")
    assert path_md5(first) != path_md5(third)
    assert json.loads((third / "verdict.json").read_text())["baseline"] == "other"


def test_deploying_a_second_release_does_not_change_its_verdict_either(tmp_path: Path) -> None:
    """It was compared with the first one, and still is when it is the stable one itself."""
    run(tmp_path, {"release": None}, "first", name="a", value=0.85)
    card_a, card_b = tmp_path / "a", tmp_path / "b"
    stable_a = gate.baseline_from_scorecard(
        card_a / "scores.parquet", "a" * 16, path_md5(card_a), {"release": None}
    )
    before = run(tmp_path, stable_a, "before", name="b", value=0.95)
    assert json.loads((before / "verdict.json").read_text())["baseline"] == path_md5(card_a)
    stable_b = gate.baseline_from_scorecard(
        card_b / "scores.parquet", "b" * 16, path_md5(card_b), stable_a
    )
    after = run(tmp_path, stable_b, "after", name="b")
    assert path_md5(before) == path_md5(after)
    stable_c = gate.baseline_from_scorecard(card_b / "scores.parquet", "c" * 16, "m", stable_b)
    assert "previous" not in stable_c["previous"]  # one step back, not a chain


def test_the_baseline_holds_every_valid_score_of_the_candidate(tmp_path: Path) -> None:
    numbers = perfect(ASKED)
    numbers["candidate", "answer_overlap"]["q000"] = None
    folder = write_card(tmp_path / "card", numbers)
    baseline = gate.baseline_from_scorecard(folder / "scores.parquet", "a" * 16, "m")
    assert baseline["release"] == "a" * 16 and baseline["scorecard"] == "m"
    assert set(baseline["scores"]) == {item.id for item in ASKED}
    assert "answer_overlap" not in baseline["scores"]["q000"]
    assert baseline["scores"]["q001"]["answer_overlap"] == 0.9
    file = tmp_path / "stable.json"
    file.write_text(json.dumps(baseline))
    assert gate.read_stable(file) == baseline


def test_a_failing_gate_leaves_its_report_and_says_every_reason(
    tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(GateError) as error:
        run(tmp_path, {"release": None}, "out", value=0.1, base=0.1)
    verdict = Verdict.model_validate_json((tmp_path / "out" / "verdict.json").read_text())
    assert verdict.verdict == "FAIL"
    assert error.value.exit_code == 3
    assert error.value.offenders == verdict.reasons
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(reason.split(" (")[0] in page for reason in verdict.reasons)
    assert (tmp_path / "out" / "gate.png").read_bytes().startswith(b"\x89PNG")
    # DVC and the bridge put the last good output back; this copy stays.
    kept = settings.state_dir / "refused" / "gate"
    assert path_md5(kept) == path_md5(tmp_path / "out")
    assert str(kept / "report.html") in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        ("[]", 'no "release"'),
        ('{"release": "abc"}', "without its scores"),
    ],
)
def test_a_broken_stable_file_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "stable.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says):
        gate.read_stable(path)


def test_an_incomplete_scorecard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="incomplete"):
        gate.read_card(tmp_path)
