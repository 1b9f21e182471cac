"""resources.judging.calibration: what a judge is worth, and what follows from it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.judge_server import JudgeServer
from benchmarks.judges import broken
from contracts.errors import ConfigError, InputError, ServiceError
from contracts.params import parse_params
from contracts.settings import ROOT, Settings
from pipelines import judge as command
from resources.judging import agreement, calibration, pairwise
from resources.judging.calibration import Calibration, PairLabel, ScoreLabel, uncalibrated
from resources.judging.judge import Endpoint, judged

RECORDING = [
    json.loads(line)
    for line in Path(__file__).with_name("judge_recording.jsonl").read_text().splitlines()
]
LABELS = [
    PairLabel(**{name: row[name] for name in ("question", "first", "second", "better")})
    for row in RECORDING
]


def says(judge: str) -> Any:
    """The recorded verdicts of one of the two judges."""
    said = {}
    for row in RECORDING:
        plain, swapped = row[judge]
        said[row["question"], row["first"]] = plain
        said[row["question"], row["second"]] = swapped

    def answer(shown: Mapping[str, Any]) -> dict[str, str]:
        return {"evidence": "recorded", "verdict": said[shown["question"], shown["answer_A"]]}

    return answer


def measure(answer: Any, labels: Any = LABELS, **more: Any) -> list[Calibration]:
    with JudgeServer(answer) as server:
        endpoint = Endpoint(server.url, "m", **{"concurrent": 16, **more})
        return judged(endpoint, None, lambda judge: calibration.calibrate(judge, labels))


def test_a_careful_judge() -> None:
    """27 of 30 right in both orders, two take what stands second, one is wrong twice."""
    (made,) = measure(says("careful"))
    assert made.version == pairwise.form().version("m") and made.served == ["recorded"]
    assert (made.n, made.invalid) == (30, {})
    assert made.right.value == 0.9
    assert made.same is not None and made.same.value == pytest.approx(28 / 30, abs=1e-6)
    assert made.flip_rate is not None and made.flip_rate.value == pytest.approx(2 / 30, abs=1e-6)
    assert made.accuracy == pytest.approx((2 * 27 + 2) / 60, abs=1e-6)
    # By hand: 14 first, 13 second, 3 tie by people; 12, 13, 3 and two without a vote by the judge.
    assert made.confusion["tie"] == {"tie": 3}
    judge = {
        name: sum(r.get(name, 0) for r in made.confusion.values()) for name in ("first", "second")
    }
    chance = (14 * judge["first"] + 13 * judge["second"] + 3 * 3) / 900
    assert made.kappa.value == pytest.approx((0.9 - chance) / (1 - chance), abs=1e-6)
    assert uncalibrated(made, 0.4) is None


def test_a_judge_that_looks_at_the_place() -> None:
    (made,) = measure(says("hasty"))
    assert made.right.value == pytest.approx(9 / 30, abs=1e-6)
    assert made.flip_rate is not None and made.flip_rate.value == 0.7
    doubt = uncalibrated(made, 0.4)
    assert doubt is not None and "not shown to reach 0.4" in doubt


def test_calls_that_fail_never_make_a_judge_look_better() -> None:
    (whole,) = measure(says("careful"))
    for seed in range(2):
        (made,) = measure(broken(says("careful"), seed), deadline=2.0)
        assert made.kappa.value < whole.kappa.value and made.right.value < whole.right.value
        assert 5 < sum(made.invalid.values()) < 25  # of 30 pairs, 51 % on average
        assert made.n == 30


def test_a_judge_that_never_answers_is_worth_nothing() -> None:
    (made,) = measure(lambda _: "garbage")
    assert made.kappa.value == 0 and made.invalid == {"unparseable": 30}
    assert made.right.value == 0 and made.served == []
    assert uncalibrated(made, 0.0) is not None  # even where the policy asks for nothing


def test_scores_are_calibrated_by_their_criterion() -> None:
    labels = [
        ScoreLabel(question=f"Q{n}?", answer=f"{n % 5 + 1}", criterion=criterion, score=n % 5 + 1)
        for criterion in ("relevance", "correctness")
        for n in range(40)
    ]

    def answer(shown: Mapping[str, Any]) -> dict[str, Any]:
        return {"evidence": "e", "score": min(5, int(shown["answer"]) + 1)}

    near, also = measure(answer, labels)
    assert (near.form, also.form) == ("rubric_relevance", "rubric_correctness")
    assert near.version != also.version
    assert near.right.value == 0.2 and near.kappa.value > 0.7  # one off is nearly right
    assert near.flip_rate is None and near.same is None
    far = [label.model_copy(update={"score": 6 - label.score}) for label in labels]
    assert measure(answer, far)[0].kappa.value < -0.5


def test_kappa_and_its_interval_by_known_numbers() -> None:
    """Cohen's example of textbooks: 20, 5, 10, 15 give 0.4."""
    people = ["yes"] * 25 + ["no"] * 25
    judge = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agreement.kappa(people, judge).value == 0.4
    assert agreement.kappa(people, people).value == 1.0
    assert agreement.kappa(people, people).low < 0.9  # 50 labels prove no more
    assert agreement.kappa(["yes"] * 9, ["yes"] * 9).value == 0.0  # one label tells nothing
    assert agreement.kappa([], []).low == -1.0
    assert agreement.kappa([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], agreement.squared).value == -1.0
    wilson = agreement.share(9, 10)
    assert (wilson.low, wilson.high) == pytest.approx((0.5958, 0.9821), abs=1e-3)


def test_the_interval_holds_the_truth() -> None:
    """400 sets of 60 labels of a judge that is right in 85 % of them and fails in 5 %."""
    chance = random.Random(7)
    held = above = 0
    true = (0.8 - 0.475) / (1 - 0.475)  # right 0.8; by chance 0.5 * 0.475 twice
    for _ in range(400):
        people = [chance.choice("ab") for _ in range(60)]
        judge: list[str | None] = []
        for person in people:
            draw = chance.random()
            other = "b" if person == "a" else "a"
            judge.append(None if draw < 0.05 else person if draw < 0.85 else other)
        found = agreement.kappa(people, judge)
        held += found.low <= true <= found.high
        above += found.low > true
    assert held >= 0.92 * 400 and above <= 0.05 * 400


def known(**more: Any) -> Calibration:
    whole = {"value": 0.8, "low": 0.6, "high": 0.9}
    fields = {"version": "v", "form": "pairwise", "model": "m", "served": ["m-1"], "labels": "0"}
    fields |= {"n": 100, "right": whole, "accuracy": 0.9, "kappa": whole, "invalid": {}}
    return Calibration.model_validate(fields | {"confusion": {}} | more)


def test_what_may_decide() -> None:
    assert uncalibrated(known(), 0.6, ["m-1"]) is None
    assert "nobody" in (uncalibrated(None, 0.0) or "")
    assert "0.61" in (uncalibrated(known(), 0.61) or "")  # by the lower end, not by the value
    assert "m-2" in (uncalibrated(known(), 0.4, ["m-1", "m-2"]) or "")  # behind an alias


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "JSON"),
        ('{"question": "secret", "first": "a", "second": "b", "better": "left"}', "better"),
        ('{"question": "secret", "answer": "a", "criterion": "relevance", "score": 6}', "score"),
        ('{"question": "secret", "answer": "a", "criterion": "charm", "score": 3}', "criterion"),
        ('{"question": "secret", "answer": "a", "criterion": "relevance"}', "score"),
        ("", "JSON"),
    ],
)
def test_bad_labels_are_all_named_and_not_quoted(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{LABELS[0].model_dump_json()}\n{line}\n{line}\n")
    with pytest.raises(InputError) as error:
        calibration.read_labels(path)
    assert "line 2" in str(error.value) and "line 3" in str(error.value)
    assert told in str(error.value) and "secret" not in str(error.value)


def test_no_labels_are_no_calibration(tmp_path: Path) -> None:
    for content in (None, ""):
        if content is not None:
            (tmp_path / "labels.jsonl").write_text(content)
        with pytest.raises(InputError):
            calibration.read_labels(tmp_path / "labels.jsonl")


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(settings: Settings) -> Path:
    """A checkout whose params.yaml names a judge."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["scorecard"]["judge"] = {"model": "m"}
    (settings.root / "params.yaml").write_text(yaml.safe_dump(values))
    (settings.root / "data").mkdir()
    return settings.root


def write_labels(folder: Path) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join(label.model_dump_json() + "\n" for label in LABELS))
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_keeps_what_it_measured(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = write_labels(tmp_path)
    with JudgeServer(says("careful")) as server:
        monkeypatch.setenv("JUDGE_URL", f"{server.url}/v1")
        monkeypatch.setenv("JUDGE_API_KEY", "sk-secret-of-the-judge")
        said = run("calibrate", "--labels", str(labels), "--out", str(tmp_path / "out"))
        asked = len(server.bodies)
        run("calibrate", "--labels", str(labels))
        assert len(server.bodies) == asked == 60  # the second time from the cache
        assert set(server.keys) == {"Bearer sk-secret-of-the-judge"}
    assert "right 0.90" in said and "may decide" in said
    store = calibration.read_store(checkout / "data" / "judges.json")
    assert list(store) == [pairwise.form().version("m")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Kappa with 95 % intervals" in page and "data:image/png" in page
    told = run("report", "--out", str(tmp_path / "again"))
    assert "pairwise" in told and "nobody has compared" in told  # of the criteria in use
    assert (tmp_path / "again" / "report.html").read_text() == page
    for path in [*checkout.rglob("*"), *tmp_path.rglob("*")]:
        assert not path.is_file() or b"sk-secret" not in path.read_bytes(), path


def test_an_outage_does_not_replace_what_was_known(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, store = write_labels(tmp_path), checkout / "data" / "judges.json"
    calibration.write_store(store, {"v": known()})
    with JudgeServer(lambda _: "error") as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        with pytest.raises(ServiceError, match="answered nothing"):
            run("calibrate", "--labels", str(labels))
    assert list(calibration.read_store(store)) == ["v"]


def test_a_misspelt_key_of_the_judge_is_named_with_its_neighbour() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["scorecard"]["judge"] = {"model": "m", "criterias": ["relevance"]}
    with pytest.raises(ConfigError, match="did you mean 'criteria'"):
        parse_params(values)


def test_without_a_judge_or_its_address(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="JUDGE_URL"):
        run("calibrate", "--labels", str(write_labels(tmp_path)))
    (checkout / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(ConfigError, match="names no judge"):
        run("calibrate", "--labels", str(write_labels(tmp_path)))
    assert "no judge has been calibrated" in run("report")
    (checkout / "data" / "judges.json").write_text('{"v": {}}')
    with pytest.raises(InputError, match="cannot be read"):
        run("report")
