"""Retrieval: a real index, a choice that is honest, a floor that blocks after its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from contracts.digests import dir_md5
from contracts.errors import InputError, QualityError
from contracts.params import Search
from stages import index, retrieval, vectors
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
    question(
        "locked",
        question="how long must I work the flour",
        document="docs/bread.md",
        section="Bread",
        answer="Knead the dough for ten minutes",
        split="test",
    ),
]


def build(folder: Path, search: Search) -> Path:
    """A real index over the tiny knowledge base."""
    chunks, made = write_chunks(folder), folder / "vectors.parquet"
    vectors.run(paths(chunks=chunks, out=made), params())
    knobs = params(index={"search": search})
    index.run(paths(chunks=chunks, vectors=made, out=folder / "index"), knobs)
    return folder / "index"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("knowledge"), Search())


@pytest.fixture
def inputs(built: Path, tmp_path: Path) -> dict[str, Path]:
    return options(built, tmp_path)


def options(index: Path, folder: Path) -> dict[str, Path]:
    golden = folder / "questions.yaml"
    golden.write_text(yaml.safe_dump(GOLDEN))
    return {"index": index, "golden": golden, "out": folder / "retrieval"}


def test_golden_dev_questions_are_found(inputs: dict[str, Path]) -> None:
    metrics = retrieval.run(paths(**inputs), params())
    assert metrics["questions"] == 3  # the test split and the unanswerable are not counted
    assert metrics["recall_at_3"] == metrics["answer_at_3"] == 1.0
    assert metrics["mrr"] > 0.6 and 0.6 < metrics["ndcg_at_10"] <= 1
    out = inputs["out"]
    for name in ("retrieval", "classes", "similarity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["id"]: row for row in pq.read_table(out / "questions.parquet").to_pylist()}
    assert sorted(rows) == ["floor", "none", "rollback", "verdict"]
    assert rows["none"]["recall_at_3"] is None and rows["verdict"]["recall_at_3"] == 1.0
    assert rows["none"]["scores"][0] < 0.3 < rows["verdict"]["scores"][0]
    assert rows["floor"]["class"] == "definition" and rows["none"]["source"] == ""
    assert rows["floor"]["rank_sparse"] == rows["floor"]["rank_fused"] == 1
    manifest = json.loads((inputs["index"] / "manifest.json").read_text())
    assert len(set(rows["verdict"]["chunk_ids"])) == manifest["count"]
    first = dir_md5(out)
    retrieval.run(paths(**inputs), params())
    assert dir_md5(out) == first


def test_the_report_compares_ways_of_searching_and_names_no_test_question(
    inputs: dict[str, Path],
) -> None:
    metrics = retrieval.run(paths(**inputs), params())
    out = inputs["out"]
    report = json.loads((out / "report.json").read_text())
    manifest = json.loads((inputs["index"] / "manifest.json").read_text())
    assert report["index"] == manifest["content"]
    low, high = report["intervals"]["mrr"]
    assert low <= report["metrics"]["mrr"] <= high
    grid = params().retrieval.fused
    for split, count in (("dev", 3), ("test", 1)):
        arms = report["arms"][split]
        assert len(arms) == 2 + len(grid.rrf_k) * len(grid.weights)
        assert {arm["questions"] for arm in arms.values()} == {count}
    assert metrics["test_questions"] == 1 and metrics["test_recall_at_10"] == 1.0
    assert metrics["dense_ndcg_at_10"] == metrics["ndcg_at_10"]
    by_class = report["by_class"]["dev"]["dense"]
    assert {name: part["questions"] for name, part in by_class.items()} == {
        "value": 1,
        "definition": 2,
    }
    assert report["by_source"]["dev"]["dense"]["docs"]["ndcg_at_10"][0] == metrics["ndcg_at_10"]
    page = (out / "report.html").read_text()
    assert "how long must I" not in page and "locked" not in page + json.dumps(report)


def test_an_index_that_searches_otherwise_than_dev_chooses_is_a_warning(
    tmp_path: Path,
) -> None:
    fused = Search(mode="fused", rrf_k=7, weights=(2.0, 1.0))
    inputs = options(build(tmp_path, fused), tmp_path)
    metrics = retrieval.run(paths(**inputs), params())
    report = json.loads((inputs["out"] / "report.json").read_text())
    assert report["choice"]["own"] == "fused 2:1, k 7" in report["arms"]["dev"]
    assert report["choice"]["chosen"] == "dense" and metrics["agrees_with_choice"] == 0
    assert metrics["ndcg_at_10"] == report["arms"]["dev"]["fused 2:1, k 7"]["ndcg_at_10"][0]
    page = (inputs["out"] / "report.html").read_text()
    assert "Warning: dev chooses dense, the index searches fused 2:1, k 7." in page


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


def test_golden_questions_may_lie_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump([question("b")]))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump([question("a")]))
    assert [item.id for item in retrieval.read_questions(tmp_path)] == ["a", "b"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump([question("a")]))
    with pytest.raises(InputError, match="damaged") as caught:
        retrieval.read_questions(tmp_path)
    assert caught.value.offenders == ["a: this id stands twice"]


def test_an_index_of_another_model_is_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="The index was made with all-MiniLM-L6-v2"):
        retrieval.run(paths(**inputs), params(vectors={"dtype": "bfloat16"}))
