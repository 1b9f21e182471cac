"""The gate as a stage: its looks, its reserve questions, the files that it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from assets import gate_files
from contracts.digests import path_md5
from contracts.errors import (
    ConfigError,
    GateError,
    InputError,
    InvalidError,
    NotFoundError,
    UndecidedError,
)
from contracts.policy import load_policy
from contracts.records import Example, Verdict
from contracts.settings import ROOT, Settings
from stages import evidence, gate, harness, scorecard
from stages.gating.card import Card, Other, baseline_from_scorecard
from stages.gating.verdict import Case, judge
from stages.safety import listed
from tests.stages import gate_cases as cases
from tests.stages.evaluation_models import examples, params
from tests.stages.gate_cases import card, perfect, policy, release

ASKED = examples()
ANSWERABLE = [item.id for item in ASKED if item.answerable]
THREE = policy(looks={"alpha": 0.05, "reserve": [0, 80, 160]})


class Drawn:
    """Reserve questions whose scores are known: ``gain`` is the candidate's difference."""

    def __init__(self, gain: float, spread: float = 0.15) -> None:
        rng = np.random.default_rng(4)
        self.gains = (gain + rng.normal(0, spread, 160)).tolist()
        self.calls: list[tuple[list[str], int, int]] = []

    def __call__(
        self, before: Card, others: Sequence[Other], start: int, stop: int
    ) -> tuple[Card, list[Other]]:
        from dataclasses import replace

        self.calls.append(([other.name for other in others], start, stop))
        names = [f"r{at}" for at in range(start, stop)]
        asked = {
            name: {"id": name, "question": "", "document": f"d{at // 2}", "answerable": True}
            for at, name in enumerate(names)
        }
        mine = {
            "answer_overlap": dict(zip(names, self.gains[start:stop], strict=True)),
            "exact_match": dict.fromkeys(names, 1.0),
            "false_refusal": dict.fromkeys(names, 0.0),
        }
        theirs = mine | {"answer_overlap": dict.fromkeys(names, 0.0)}
        add = lambda a, b: {m: {**a.get(m, {}), **b.get(m, {})} for m in {**a, **b}}  # noqa: E731
        grown = replace(
            before,
            questions=before.questions | asked,
            candidate=add(before.candidate, mine),
            base=add(before.base, theirs),
        )
        return grown, [replace(one, scores=add(one.scores, theirs)) for one in others]


def undecided_case(draw: Any, reserve: int = 160) -> Case:
    """Noise of 0.15 around no difference against the live release, on 40 questions."""
    noise = np.random.default_rng(5).normal(0, 0.15, 40)
    numbers = perfect(ASKED)
    numbers["candidate", "answer_overlap"] = dict(
        zip(ANSWERABLE, (0.8 + noise - noise.mean()).tolist(), strict=True)
    )
    found = card(ASKED, numbers, policy=THREE.sha256)
    live = release(
        {
            "answer_overlap": dict.fromkeys(ANSWERABLE, 0.8),
            "exact_match": dict.fromkeys(ANSWERABLE, 1.0),
            "false_refusal": dict.fromkeys(ANSWERABLE, 0.0),
        }
    )
    others = [Other("base", found.base), live]
    return Case(found, others, cases.profile(), cases.PLAN, reserve=reserve, draw=draw)


@pytest.mark.parametrize(
    ("gain", "word", "looks"), [(0.05, "PASS", 2), (-0.2, "FAIL", 2), (-0.03, "UNDECIDED", 3)]
)
def test_undecided_draws_more_until_it_is_shown_or_the_looks_are_over(
    gain: float, word: str, looks: int
) -> None:
    draw = Drawn(gain)
    found = judge(undecided_case(draw), THREE).verdict
    assert found.verdict == word
    assert [row["verdict"] for row in found.looks] == ["UNDECIDED"] * (looks - 1) + [word]
    assert [call[1:] for call in draw.calls] == [(0, 80), (80, 160)][: looks - 1]
    assert all("base" not in call[0] for call in draw.calls)  # decided at the first look
    levels = [row["level"] for row in found.looks]
    assert levels == sorted(levels) and levels[0] < 0.005
    assert {check.against for check in found.checks if check.kind == "paired"} == {"base", "live"}


def test_a_verdict_that_failed_elsewhere_draws_nothing() -> None:
    draw = Drawn(0.05)
    case = undecided_case(draw)
    slow = cases.profile(tokens_per_s=1.0)
    changed = Case(case.card, case.others, slow, case.plan, case.reserve, draw)
    assert judge(changed, THREE).verdict.verdict == "FAIL" and draw.calls == []


def test_looks_are_planned_from_what_there_is() -> None:
    found = judge(undecided_case(Drawn(0.0), reserve=0), THREE).verdict
    assert found.verdict == "UNDECIDED" and [row["level"] for row in found.looks] == [0.05]
    found = judge(undecided_case(Drawn(0.0), reserve=50), THREE).verdict
    assert [row["questions"] for row in found.looks] == [48, 98]


def test_a_release_that_is_not_installed_leaves_it_undecided_and_says_so() -> None:
    def missing(*_: Any) -> Any:
        raise NotFoundError("Release 0123456789abcdef is not installed here.")

    found = judge(undecided_case(missing), THREE).verdict
    assert found.verdict == "UNDECIDED" and len(found.looks) == 1
    assert any("is not installed here" in reason for reason in found.reasons)


# -- the policy file -----------------------------------------------------------------------------


def write_policy(path: Path, **changes: Any) -> Path:
    content = policy(**changes).model_dump(mode="json")
    path.write_text(yaml.safe_dump(content))
    return path


def test_our_policy_is_closed_and_its_digest_is_of_its_content(tmp_path: Path) -> None:
    ours = ROOT / "data" / "policies" / "gate.yaml"
    found = load_policy(ours)
    copy = tmp_path / "gate.yaml"
    copy.write_text("# another comment\n" + ours.read_text())
    assert load_policy(copy).sha256 == found.sha256
    copy.write_text(ours.read_text().replace("margin: 0.03", "margin: 0.04"))
    assert load_policy(copy).sha256 != found.sha256
    copy.write_text(ours.read_text().replace("max_missing", "max_mising"))
    with pytest.raises(ConfigError) as error:
        load_policy(copy)
    assert {text.split(":")[0] for text in error.value.offenders} == {
        "coverage.max_mising",
        "coverage.max_missing",
    }


@pytest.mark.parametrize("reserve", [[], [10], [0, 0], [0, 5, 3], [0, 1, 2, 3]])
def test_looks_are_at_most_three_and_grow(reserve: list[int]) -> None:
    with pytest.raises(ValueError, match="reserve"):
        policy(looks={"alpha": 0.05, "reserve": reserve})


def test_at_most_four_metrics_block() -> None:
    quality = policy().quality.model_dump(mode="json")
    with pytest.raises(ValueError, match="at most 4"):
        policy(quality=quality | {"blocking": quality["blocking"][:1] * 5})


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path))
    return tmp_path / "state"


def write_card(folder: Path, numbers: Any, sha256: str) -> Path:
    """A scorecard folder as the stage writes it."""
    golden, safety = cases.rows_of(numbers), cases.rows_of(cases.withstood())
    summary = scorecard.summarise(golden, ASKED, safety)
    summary |= {"policy": sha256, "safety": listed(cases.prompts())}
    folder.mkdir(parents=True)
    evidence.write_scores([*golden, *safety], folder / "scores.parquet")
    harness.write_json(folder / "summary.json", summary)
    return folder


def run(
    tmp_path: Path,
    out: str,
    *,
    stable: Any = None,
    anchor: Any = None,
    numbers: Any = None,
    name: str = "scorecard",
    changed_policy: Any = None,
) -> Path:
    """Run the stage on a passing card, unless ``numbers`` say otherwise, and give its folder."""
    data = tmp_path / "data"
    rules = write_policy(tmp_path / "gate.yaml")
    if not (data / name).exists():
        write_card(data / name, numbers or perfect(ASKED), load_policy(rules).sha256)
    if changed_policy:
        write_policy(rules, **changed_policy)
    harness.write_json(tmp_path / "profile" / "profile.json", cases.profile())
    harness.write_json(tmp_path / "bundle" / "memory.json", cases.PLAN)
    reserve = Example(
        id="r1", split="reserve", question="?", document="d", section="", answer="A.",
        passages=None, answerable=True,
    )  # fmt: skip
    (tmp_path / "examples").mkdir(exist_ok=True)
    lines = "" if out == "first" else reserve.model_dump_json() + "\n"  # there may be none
    (tmp_path / "examples" / "reserve.jsonl").write_text(lines)
    files = {"stable": stable, "anchor": anchor}
    for key, content in files.items():
        (tmp_path / f"{key}.json").write_text(json.dumps(content or {"release": None}))
    paths = SimpleNamespace(
        scorecard=data / name, profile=tmp_path / "profile", bundle=tmp_path / "bundle",
        examples=tmp_path / "examples", stable=tmp_path / "stable.json",
        anchor=tmp_path / "anchor.json", policy=rules, out=data / out,
    )  # fmt: skip
    gate.run(paths, params())
    return data / out


def baseline(tmp_path: Path, name: str, before: Any = None) -> dict[str, Any]:
    folder = tmp_path / "data" / name
    return baseline_from_scorecard(
        folder / "scores.parquet", name[-1] * 16, path_md5(folder), before
    )


def test_a_pass_leaves_verdict_figures_page_and_picture(tmp_path: Path) -> None:
    out = run(tmp_path, "gate")
    assert sorted(item.name for item in out.iterdir()) == [
        "gate.png",
        "measured.json",
        "report.html",
        "verdict.json",
    ]
    found = Verdict.model_validate_json((out / "verdict.json").read_text())
    assert found.verdict == "PASS" and found.scorecard == path_md5(tmp_path / "data" / "scorecard")
    page = (out / "report.html").read_text()
    for heading in ("Quality: comparisons", "Safety", "Fairness", "Latency", "Resources", "Looks"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img") == 6
    assert "ttft_p95_ms" in page and "115" not in (out / "verdict.json").read_text()


@pytest.mark.parametrize("which", ["stable", "anchor"])
def test_deploying_a_release_does_not_change_its_own_verdict(tmp_path: Path, which: str) -> None:
    """The file is the candidate's own: every byte is as if there were none."""
    first = run(tmp_path, "first")
    own = baseline(tmp_path, "scorecard")
    second = run(tmp_path, "second", **{which: own})
    assert path_md5(first) == path_md5(second)
    # And one with another scorecard does change it, so the equality above is no accident.
    third = run(tmp_path, "third", **{which: own | {"scorecard": "other"}})
    assert path_md5(first) != path_md5(third)
    key = {"stable": "baseline", "anchor": "anchor"}[which]
    assert json.loads((third / "verdict.json").read_text())[key] == "other"


def test_deploying_a_second_release_does_not_change_its_verdict_either(tmp_path: Path) -> None:
    """It was compared with the first one, and still is when it is the live one itself."""
    run(tmp_path, "first", name="card-a", numbers=perfect(ASKED, value=0.85))
    live_a = baseline(tmp_path, "card-a", {"release": None})
    before = run(
        tmp_path, "before", name="card-b", numbers=perfect(ASKED, value=0.95), stable=live_a
    )
    live_b = baseline(tmp_path, "card-b", live_a)
    assert live_b["previous"]["release"] == "a" * 16
    after = run(tmp_path, "after", name="card-b", stable=live_b)
    assert path_md5(before) == path_md5(after)


def test_each_verdict_has_an_exit_code_of_its_own_and_is_kept(tmp_path: Path, state: Path) -> None:
    bad = perfect(ASKED, value=0.2)
    with pytest.raises(GateError) as error:
        run(tmp_path, "bad", name="scorecard", numbers=bad)
    assert type(error.value) is GateError and error.value.exit_code == 3
    kept = state / "refused" / "gate"
    assert json.loads((kept / "verdict.json").read_text())["verdict"] == "FAIL"
    assert (kept / "report.html").is_file()

    lost = perfect(ASKED)
    lost["candidate", "answer_overlap"]["q001"] = None
    with pytest.raises(InvalidError) as invalid:
        run(tmp_path, "lost", name="lost", numbers=lost)
    assert invalid.value.exit_code == 6

    unclear = perfect(ASKED, base=0.9)
    noise = np.random.default_rng(5).normal(0, 0.2, 40)
    unclear["candidate", "answer_overlap"] = dict(
        zip(ANSWERABLE, np.clip(0.9 + noise - noise.mean(), 0, 1).tolist(), strict=True)
    )
    with pytest.raises(UndecidedError) as undecided:
        run(tmp_path, "unclear", name="unclear", numbers=unclear)
    assert undecided.value.exit_code == 5
    assert json.loads((kept / "verdict.json").read_text())["verdict"] == "UNDECIDED"


def test_a_pass_of_the_same_card_takes_the_refusal_back(tmp_path: Path, state: Path) -> None:
    run(tmp_path, "gate")
    better = baseline(tmp_path, "scorecard") | {"scorecard": "other"}
    for values in better["scores"].values():
        values["answer_overlap"] = 1.0
    with pytest.raises(GateError):
        run(tmp_path, "gate", stable=better)
    assert (state / "refused" / "gate").is_dir()
    run(tmp_path, "gate")
    assert not (state / "refused" / "gate").exists()


def test_a_policy_that_was_changed_after_scoring_is_invalid(tmp_path: Path) -> None:
    run(tmp_path, "gate")
    with pytest.raises(InvalidError, match="was made under policy"):
        run(tmp_path, "gate", changed_policy={"seed": 8})


@pytest.mark.parametrize(
    "content", ['{"releases": null}', '{"release": "a", "scores": {}}', "[]", "nothing"]
)
def test_a_baseline_that_cannot_be_read_is_an_error(tmp_path: Path, content: str) -> None:
    from stages.gating.card import read_other

    (tmp_path / "stable.json").write_text(content)
    with pytest.raises(InputError):
        read_other(tmp_path / "stable.json", "live", "")
    with pytest.raises(InputError, match="does not exist"):
        read_other(tmp_path / "none.json", "live", "")


# -- ratchet gate --------------------------------------------------------------------------------


def test_explain_shows_the_refused_verdict_until_another_card_is_judged(tmp_path: Path) -> None:
    from pipelines.gate import render

    settings = Settings.from_env()
    with pytest.raises(InputError, match="has not judged anything"):
        gate_files.last_verdict(settings)
    run(tmp_path, "gate")
    assert gate_files.last_verdict(settings)["verdict"] == "PASS"
    import shutil

    shutil.rmtree(tmp_path / "data" / "scorecard")
    with pytest.raises(GateError):
        run(tmp_path, "refused-out", numbers=perfect(ASKED, value=0.2))
    found = gate_files.last_verdict(settings)
    assert found["verdict"] == "FAIL" and "refused/gate" in found["report"] and found["current"]
    text = render(found)
    assert "gate: FAIL" in text and "quality: FAIL" in text
    assert "would change it: a mean of 0.5: 12.0 points more over the 40 questions" in text
    assert "at most 15000 is allowed" in text  # the measured figures are back
    shutil.rmtree(tmp_path / "data" / "scorecard")
    write_card(tmp_path / "data" / "scorecard", perfect(ASKED), policy().sha256)
    assert gate_files.last_verdict(settings)["verdict"] == "PASS"  # the first card stands again


def test_the_anchor_moves_by_hand_alone_and_remembers_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env()
    run(tmp_path, "gate")
    (tmp_path / "data" / "anchor.json").write_text('{"release": null}')
    md5 = path_md5(tmp_path / "data" / "scorecard")
    sealed = SimpleNamespace(
        id="b" * 16, gate={"verdict": "PASS"}, members={"scorecard": SimpleNamespace(md5=md5)}
    )
    monkeypatch.setattr("resources.releases.read_release", lambda path: sealed)
    assert "Commit data/anchor.json" in gate_files.move_anchor(settings, "first good one")
    written = json.loads((tmp_path / "data" / "anchor.json").read_text())
    assert written["release"] == "b" * 16 and written["reason"] == "first good one"
    assert "already" in gate_files.move_anchor(settings, "again")
    sealed.members["scorecard"].md5 = "another"
    with pytest.raises(InputError, match="not that of release"):
        gate_files.move_anchor(settings, "no")
