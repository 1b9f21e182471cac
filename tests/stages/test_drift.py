"""stages.drift: what the test sees, what it leaves alone, and what is called drift."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import InputError
from contracts.params import Monitoring
from contracts.settings import ROOT, Settings
from stages import drift
from stages.drift import ShiftTest
from tests.stages.evaluation_models import params

POLICY = Monitoring(min_requests=30, drift_p=0.01, drift_effect=0.1, max_refusal=0.5)


def questions(rng: np.random.Generator, count: int, topics: np.ndarray) -> np.ndarray:
    """Points near topic centres, as sentence embeddings lie."""
    picked = topics[rng.integers(len(topics), size=count)]
    return np.asarray(picked + rng.normal(0, 0.12, picked.shape), dtype=np.float32)


def topics(rng: np.random.Generator, count: int = 12) -> np.ndarray:
    centres = rng.normal(size=(count, 64))
    return np.asarray(centres / np.linalg.norm(centres, axis=1, keepdims=True))


def test_quiet_nights_raise_no_alarm_and_shifted_nights_do() -> None:
    rng = np.random.default_rng(0)
    known, new = topics(rng), topics(rng, 4)
    quiet = shifted = 0
    for _ in range(20):
        reference = questions(rng, 600, known)
        night = questions(rng, 200, known)
        quiet += drift.decide(drift.shift_test(night, reference), None, POLICY).verdict != "stable"
        night[:80] = questions(rng, 80, new)  # 40 % of the night asks about something new
        found = drift.decide(drift.shift_test(night, reference), None, POLICY)
        shifted += found.verdict == "shift"
    assert quiet <= 1
    assert shifted >= 19


def test_the_test_is_seeded_and_scale_free() -> None:
    rng = np.random.default_rng(1)
    known = topics(rng)
    reference, night = questions(rng, 200, known), questions(rng, 50, known)
    assert drift.shift_test(night, reference) == drift.shift_test(night, reference)
    scaled = drift.shift_test(night * np.float32(3), reference * np.float32(0.5))
    assert scaled.effect == pytest.approx(drift.shift_test(night, reference).effect, abs=1e-3)


def test_a_question_asked_a_hundred_times_counts_once() -> None:
    rng = np.random.default_rng(2)
    known, new = topics(rng), topics(rng, 1)
    reference, night = questions(rng, 300, known), questions(rng, 60, known)
    repeated = np.concatenate([night, np.repeat(questions(rng, 1, new), 100, axis=0)])
    found = drift.shift_test(repeated, reference)
    assert found.current == 61
    assert drift.decide(found, None, POLICY).verdict == "stable"


@pytest.mark.parametrize(
    ("current", "reference"),
    [((5, 4), (30, 5)), ((5, 4), (19, 4)), ((0, 4), (30, 4)), ((5,), (30, 4))],
)
def test_what_cannot_be_compared_is_refused(current: Any, reference: Any) -> None:
    with pytest.raises(InputError):
        drift.shift_test(np.ones(current), np.ones(reference))


def test_of(p: float, effect: float, current: int = 100) -> ShiftTest:
    return ShiftTest(current, 200, 60, p, effect, 0.5, 0.6)


test_of.__test__ = False  # type: ignore[attr-defined]
NEW = test_of(0.001, 0.3)


@pytest.mark.parametrize(
    ("test", "online", "verdict", "says"),
    [
        (None, {"refusal_rate": 0.9}, "no_verdict", "too few distinct questions"),
        (test_of(0.001, 0.3, current=29), {"refusal_rate": 0.9}, "no_verdict", "needs 30"),
        (test_of(0.02, 0.3), {"refusal_rate": 0.9}, "stable", "as close to the reference"),
        (test_of(0.001, 0.05), {"refusal_rate": 0.9}, "stable", "effect 0.050 (floor 0.1)"),
        (NEW, {"refusal_rate": 0.5}, "shift", "within 0.5"),
        (NEW, {"refusal_rate": None}, "shift", "no online evaluation"),
        (NEW, None, "shift", "no online evaluation"),
        (NEW, {"refusal_rate": 0.51}, "drift", "above 0.5"),
        (test_of(0.0, 1.0, current=30), {"refusal_rate": 1.0}, "drift", "above 0.5"),
    ],
)
def test_decide(test: ShiftTest | None, online: Any, verdict: str, says: str) -> None:
    found = drift.decide(test, online, POLICY)
    assert found.verdict == verdict
    assert says in " ".join(found.reasons)
    record = drift.as_record(test, found)
    assert record["verdict"] == verdict and record["reason"] == "; ".join(found.reasons)
    assert record.get("p") == (test.p if test else None)


def test_farthest_lists_distinct_questions_worst_first() -> None:
    similarity = np.array([0.9, 0.1, 0.5, 0.1])
    found = drift.farthest(["a", "b", "c", "b"], similarity, count=2)
    assert found == [("b", 0.1), ("c", 0.5)]


def run(folder: Path, asked: list[str], refusal: float) -> dict[str, Any]:
    """The process over a day's questions, with the repository's golden questions as reference."""
    folder.mkdir()
    rows = [{"question": question} for question in asked]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("question", pa.string())])), folder / "r")
    (folder / "o.json").write_text(json.dumps({"refusal_rate": refusal}))
    golden = ROOT / "data" / "golden" / "questions.yaml"
    given = SimpleNamespace(
        requests=folder / "r", online_eval=folder / "o.json", golden=golden, out=folder / "d.json"
    )
    drift.run(given, params())
    found: dict[str, Any] = json.loads(given.out.read_text())
    return found


def test_a_day_with_few_questions_gets_no_verdict_and_embeds_nothing(
    tmp_path: Path, settings: Settings
) -> None:
    for count in (0, 40):  # forty times the same one is one
        found = run(tmp_path / str(count), ["How do I roll back?"] * count, 1.0)
        assert found["verdict"] == "no_verdict" and found["requests"] == count
    assert not settings.embeddings_dir.exists()


@pytest.mark.slow
def test_a_day_of_cooking_questions_is_drift_and_a_day_of_golden_ones_is_not(
    tmp_path: Path, settings: Settings
) -> None:
    dishes = ["soup", "bread", "rice", "curry", "pie", "stew", "salad", "noodles"]
    strange = [f"How long does {dish} cook at {t} degrees?" for dish in dishes for t in range(5)]
    found = run(tmp_path / "strange", strange, 0.9)
    assert found["verdict"] == "drift" and found["effect"] > 0.8
    assert found["farthest"][0][0] in strange
    assert (tmp_path / "strange" / "d.html").stat().st_size > 100_000
    golden = drift.read_reference(ROOT / "data" / "golden" / "questions.yaml")
    assert run(tmp_path / "usual", golden[::2], 0.9)["verdict"] == "stable"


@pytest.mark.slow
def test_the_evidently_page_is_self_contained(tmp_path: Path) -> None:
    rows = [
        {"question": f"How do I roll back {n}?", "similarity": 0.5 + n / 100} for n in range(40)
    ]
    page = tmp_path / "drift" / "evidently.html"
    drift.evidently_report(rows, rows[:30], page)
    text = page.read_text(encoding="utf-8")
    assert "similarity" in text and "words" in text
    assert "<script src" not in text and "<link" not in text and '<img src="http' not in text
    with pytest.raises(InputError):
        drift.evidently_report([], rows, page)
