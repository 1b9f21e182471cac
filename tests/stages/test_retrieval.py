"""Retrieval: metrics by hand, a real index, a floor that blocks after its report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from contracts.digests import dir_md5
from contracts.errors import InputError, QualityError
from contracts.records import Question
from contracts.settings import Settings
from stages import index, retrieval, vectors
from stages.retrieval import Result, has_answer, in_section, scores, summarise
from tests.stages.knowledge import params, paths, write_chunks

FOLDERS = {"docs": "docs"}


def question(name: str = "q", **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "question": "What is the verdict when a score is missing?",
        "document": "docs/gates.md",
        "section": "Verdicts",
        "answer": "A missing score is INVALID.",
        "split": "dev",
        "answerable": True,
        **changes,
    }


GOLDEN = [
    question("verdict"),
    question(
        "rollback",
        question="how fast can I go back to the old release",
        document="docs/rollback.md",
        section="How long it takes",
        answer="A rollback takes less than a second, because the old engine keeps running",
    ),
    question("floor", question="What is a floor?", section="Floors", answer="A floor is the least"),
    question(
        "none",
        question="Who won the cup?",
        document=None,
        section=None,
        answer=None,
        answerable=False,
    ),
    question("locked", split="test", section="Nowhere"),
]


@pytest.fixture
def inputs(settings: Settings, tmp_path: Path) -> dict[str, Path]:
    chunks, made = write_chunks(tmp_path), tmp_path / "vectors.parquet"
    vectors.run(paths(chunks=chunks, out=made), params())
    index.run(paths(chunks=chunks, vectors=made, out=tmp_path / "index"), params())
    golden = tmp_path / "questions.yaml"
    golden.write_text(yaml.safe_dump(GOLDEN))
    return {"index": tmp_path / "index", "golden": golden, "out": tmp_path / "retrieval"}


def test_golden_dev_questions_are_found(inputs: dict[str, Path]) -> None:
    metrics = retrieval.run(paths(**inputs), params())
    assert metrics["questions"] == 3  # the test split and the unanswerable are not counted
    assert metrics["recall_at_3"] == metrics["answer_at_3"] == 1.0
    assert metrics["mrr"] > 0.6 and 0.6 < metrics["ndcg_at_10"] <= 1
    out = inputs["out"]
    assert (out / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["id"]: row for row in pq.read_table(out / "questions.parquet").to_pylist()}
    assert sorted(rows) == ["floor", "none", "rollback", "verdict"]
    assert rows["none"]["recall_at_3"] is None and rows["verdict"]["recall_at_3"] == 1.0
    assert rows["none"]["scores"][0] < 0.3 < rows["verdict"]["scores"][0]
    assert len(rows["verdict"]["chunk_ids"]) == 6
    report = json.loads((out / "report.json").read_text())
    low, high = report["intervals"]["mrr"]
    assert low <= report["metrics"]["mrr"] <= high
    first = dir_md5(out)
    retrieval.run(paths(**inputs), params())
    assert dir_md5(out) == first


def test_below_the_floor_it_fails_after_its_report(inputs: dict[str, Path]) -> None:
    """A question that no chunk answers first: recall@1 stays below 1."""
    odd = question("odd", question="dough and warm places", section="Floors", answer="A floor is")
    inputs["golden"].write_text(yaml.safe_dump([*GOLDEN, odd]))
    strict = params(retrieval={"top_k": [1], "min_recall": 1.0})
    with pytest.raises(QualityError, match=r"recall_at_1 is 0\.\d+; 1\.0 is the floor"):
        retrieval.run(paths(**inputs), strict)
    assert json.loads((inputs["out"] / "report.json").read_text())["floor"] == {"recall_at_1": 1.0}


def test_questions_whose_section_is_not_indexed_are_all_named(inputs: dict[str, Path]) -> None:
    wrong = [
        question("a", section="Verdict", answer="not in it"),
        question("b", document="docs/gate.md"),
        question("c"),
    ]
    inputs["golden"].write_text(yaml.safe_dump(wrong))
    with pytest.raises(InputError, match="does not hold") as caught:
        retrieval.run(paths(**inputs), params())
    assert caught.value.offenders == ["a: docs/gates.md > Verdict", "b: docs/gate.md > Verdicts"]


def test_damaged_golden_questions_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    items = [{"id": "x"}, question("y", splitt="dev"), question(), question()]
    path.write_text(yaml.safe_dump(items))
    with pytest.raises(InputError, match="damaged") as caught:
        retrieval.read_questions(path)
    text = "\n".join(caught.value.offenders)
    assert "x: ('question',)" in text and "y: ('splitt',)" in text and "q: this id" in text
    with pytest.raises(InputError, match="cannot be read"):
        retrieval.read_questions(tmp_path / "absent.yaml")


def test_an_index_of_another_model_is_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="The index was made with all-MiniLM-L6-v2"):
        retrieval.run(paths(**inputs), params(vectors={"dtype": "float32"}))


def hit(path: str, heading: str, text: str) -> Any:
    return SimpleNamespace(source="docs", path=path, heading=heading, text=text)


def test_what_is_relevant() -> None:
    asked = Question.model_validate(question(answer="It holds\n two lines."))
    cases = [
        (hit("gates.md", "Gates > Verdicts", "x"), True, False),
        (hit("gates.md", "Gates > Verdicts > Deeper", "x"), True, False),
        (hit("gates.md", "Gates > Other", "so: It  holds two\nlines. Yes"), True, True),
        (hit("gates.md", "Gates > Verdicts in short", "x"), False, False),
        (hit("other.md", "Gates > Verdicts", "It holds two lines."), False, False),
    ]
    for chunk, section, answer in cases:
        assert in_section(asked, chunk, FOLDERS) is section
        assert has_answer(asked, chunk, FOLDERS) is answer


def result(marks: list[bool], relevant: int = 2) -> Result:
    answers = [False] * len(marks)
    return Result(Question.model_validate(question()), [], marks, answers, relevant)


def test_metrics_by_hand() -> None:
    found = scores(result([False, True, False, True]), [1, 2, 3])
    assert (found["recall_at_1"], found["recall_at_2"], found["mrr"]) == (0, 1, 0.5)
    best = 1 + 1 / math.log2(3)
    assert found["ndcg_at_10"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)
    assert found["answer_at_3"] == 0
    perfect = scores(result([True, True]), [1])
    assert perfect["ndcg_at_10"] == perfect["mrr"] == 1
    late = scores(result([False] * 10 + [True]), [11])
    assert late["recall_at_11"] == 1 and late["mrr"] == late["ndcg_at_10"] == 0


def test_intervals_hold_the_mean_and_narrow_with_more_questions() -> None:
    few = [result([n % 2 == 0]) for n in range(10)]
    metrics, narrow = summarise(few * 20, [1])
    _, wide = summarise(few, [1])
    assert metrics["recall_at_1"] == 0.5
    assert wide["recall_at_1"][0] < narrow["recall_at_1"][0] < 0.5 < narrow["recall_at_1"][1]
    assert summarise(few, [1])[1] == wide
