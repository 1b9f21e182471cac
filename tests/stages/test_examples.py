"""examples: made from free documents only, the same every time, and never leaking."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.errors import InputError
from contracts.records import Chunk, Document, Example, Passage, Question
from stages import examples, generated, tables
from stages.chunks import schema
from stages.nano import layout
from tests.stages.evaluation_models import params
from tests.stages.nano_models import TOPICS

HEADINGS = {name: f"{name} > About {name.lower()}" for name in TOPICS}


def documents() -> list[Document]:
    return [
        Document(doc_id=f"docs:{name.lower()}.md", source="docs", path=f"{name.lower()}.md",
                 title=name, md5="0" * 32, text=text, git_path=f"docs/{name.lower()}.md")
        for name, text in TOPICS.items()
    ]  # fmt: skip


def chunks() -> list[dict[str, Any]]:
    rows = []
    for doc in documents():
        middle = doc.text.index(". ", 100) + 2
        for start, end in ((0, middle), (middle, len(doc.text))):
            text = doc.text[start:end]
            rows.append(
                Chunk(chunk_id=f"{doc.doc_id}#{start}-{end}", doc_id=doc.doc_id, source=doc.source,
                      path=doc.path, title=doc.title, heading=HEADINGS[doc.title], start=start,
                      end=end, tokens=9, text_sha="0" * 64, text=text).model_dump()
            )  # fmt: skip
    return rows


def question(name: str, page: str | None, split: str, **changed: Any) -> dict[str, Any]:
    answer = TOPICS[page.capitalize()].split(". ")[0] + "." if page else None
    return {
        "id": name,
        "question": f"What about {name}?",
        "document": f"docs/{page}.md" if page else None,
        "section": f"About {page}" if page else None,
        "answer": answer,
        "split": split,
        "answerable": page is not None,
        **changed,
    }


GOLDEN = [
    question("g1", "gates", "dev"),
    question("r1", "releases", "test"),
    question("u1", None, "dev"),
    question("u2", None, "test"),
]


@pytest.fixture
def paths(tmp_path: Path) -> SimpleNamespace:
    import pyarrow as pa

    table = pa.Table.from_pylist([doc.model_dump() for doc in documents()])
    tables.write_table(tmp_path / "documents.parquet", table)
    tables.write_rows(tmp_path / "chunks.parquet", chunks(), schema())
    found = SimpleNamespace(
        documents=tmp_path / "documents.parquet",
        chunks=tmp_path / "chunks.parquet",
        golden=tmp_path / "questions.yaml",
        out=tmp_path / "examples",
    )
    found.golden.write_text(json.dumps(GOLDEN))
    return found


def run(paths: Any, sentences: int | None = None) -> dict[str, list[Example]]:
    small = params().examples.model_copy(update={"train": 60})
    shown = params().answers.model_copy(update={"sentences": sentences, "min_score": -1.0})
    examples.run(paths, params().model_copy(update={"examples": small, "answers": shown}))
    return {
        split: [
            Example.model_validate_json(line)
            for line in (paths.out / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in examples.SPLITS
    }


def test_training_sees_free_documents_only(paths: Any) -> None:
    rows = run(paths)
    free = {"docs/sizing.md", "docs/drift.md"}
    assert {row.document for row in rows["train"] if row.document} == free
    shown = {p.path for row in rows["train"] for p in row.passages or []}
    assert shown == {"sizing.md", "drift.md"}
    assert json.loads((paths.out / "manifest.json").read_text())["train"] == len(rows["train"])


def test_training_answers_are_verbatim(paths: Any) -> None:
    rows = run(paths)["train"]
    answered = [row for row in rows if row.answerable]
    assert len(answered) > 20
    assert len(answered) < len(rows), "some are to be refused"
    for row in answered:
        passages = row.passages or []
        assert row.answer is not None
        assert any(row.answer in p.text for p in passages)
        target = layout.find_target(layout.render_user(row.question, passages), row.answer)
        assert target is not None
    for row in rows:
        if not row.answerable:
            assert row.answer is None
            assert row.document is None


def test_passages_are_the_sentences_that_an_answer_would_be_shown(paths: Any) -> None:
    rows = run(paths, sentences=3)
    assert len(rows["train"]) > 20
    for row in rows["train"]:
        passages = row.passages or []
        assert 1 <= len(passages) <= 3
        scores = [passage.score for passage in passages]
        assert scores == sorted(scores, reverse=True)
        assert row.answer is None or any(row.answer in passage.text for passage in passages)


def test_dev_is_shown_the_chunk_that_answers(paths: Any) -> None:
    rows = {row.id: row for row in run(paths)["dev"]}
    found = rows["g1"]
    assert found.passages is not None
    assert len(found.passages) == 3
    assert found.answer is not None
    assert any(found.answer in p.text for p in found.passages)
    assert rows["u1"].passages is not None


def test_test_is_left_to_retrieval(paths: Any) -> None:
    assert [row.passages for row in run(paths)["test"]] == [None, None]


def test_twice_the_same_bytes(paths: Any) -> None:
    run(paths)
    first = {p.name: p.read_bytes() for p in paths.out.iterdir()}
    run(paths)
    assert first == {p.name: p.read_bytes() for p in paths.out.iterdir()}


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (question("g2", "gates", "test", answer="A missing score is invalid."), "docs/gates.md"),
        (question("u9", None, "test", question="what about  G1?"), "what about g1?"),
    ],
)
def test_a_leak_is_refused(paths: Any, added: dict[str, Any], says: str) -> None:
    paths.golden.write_text(json.dumps([*GOLDEN, added]))
    with pytest.raises(InputError) as error:
        run(paths)
    assert any(says in offender for offender in error.value.offenders)
    assert not paths.out.exists()


def test_every_leak_is_listed() -> None:
    def row(name: str, split: str, **values: Any) -> Example:
        base = {"id": name, "split": split, "question": name, "document": None, "section": None,
                "answer": None, "passages": None, "answerable": True}  # fmt: skip
        return Example.model_validate({**base, **values})

    rows = {
        "train": [row("a", "train", document="d", answer="X  y")],
        "dev": [row("b", "dev", question="A", answer="x Y")],
        "test": [row("c", "test", document="d")],
    }
    with pytest.raises(InputError) as error:
        examples.refuse_leaks(rows)
    kinds = [offender.split()[0] for offender in error.value.offenders]
    assert sorted(kinds) == ["answer", "document", "question"]
    assert all("train: a" in offender for offender in error.value.offenders)


def test_answers_of_golden_questions_are_not_taught(paths: Any) -> None:
    """A sentence that two pages share may be a golden answer on one of them."""
    shared = TOPICS["Sizing"].split(". ")[1] + "."
    texts = [doc.model_dump() for doc in documents()]
    texts[1]["text"] += f" {shared}"
    import pyarrow as pa

    tables.write_table(paths.documents, pa.Table.from_pylist(texts))
    paths.golden.write_text(json.dumps([*GOLDEN, question("g3", "gates", "dev", answer=shared)]))
    rows = run(paths)
    assert shared not in {row.answer for row in rows["train"]}


def test_golden_questions_without_ground_are_listed(paths: Any) -> None:
    bad = [
        question("x1", "gates", "dev", answer="Nobody wrote this."),
        question("x2", "sizing", "dev", document="docs/gone.md"),
    ]
    paths.golden.write_text(json.dumps([*GOLDEN, *bad]))
    with pytest.raises(InputError) as error:
        run(paths)
    assert [offender[:2] for offender in error.value.offenders] == ["x1", "x2"]


def test_malformed_golden_entries_are_listed(paths: Any) -> None:
    paths.golden.write_text(json.dumps([{**GOLDEN[0], "spilt": "dev"}, {"id": "y"}]))
    with pytest.raises(InputError) as error:
        run(paths)
    assert len(error.value.offenders) == 2


def test_no_free_document(paths: Any) -> None:
    taken = [question(f"t{n}", page.lower(), "dev") for n, page in enumerate(TOPICS)]
    paths.golden.write_text(json.dumps(taken))
    with pytest.raises(InputError, match="No document is left"):
        run(paths)


# -- the reserve ---------------------------------------------------------------------------------


def drawn(others: list[Example], count: int = 6) -> list[Example]:
    free = [doc for doc in documents() if doc.title in ("Sizing", "Drift")]
    knobs = params().examples.model_copy(update={"reserve": count})
    golden = [Question.model_validate(item) for item in GOLDEN]
    return generated.reserve(free, chunks(), golden, others, knobs)


def shown(title: str, **values: Any) -> Example:
    """A training example that shows one chunk of that page."""
    (chunk, *_) = [row for row in chunks() if row["title"] == title]
    passage = Passage(n=1, chunk_id=chunk["chunk_id"], path="p", title=title, heading="h",
                      text=chunk["text"], score=0.0)  # fmt: skip
    given = {"id": "t1", "split": "train", "question": "Which of them?", "document": None,
             "section": None, "answer": None, "answerable": False}  # fmt: skip
    return Example.model_validate({**given, "passages": [passage], **values})


def test_the_reserve_asks_about_documents_that_no_other_split_shows() -> None:
    rows = drawn([shown("Sizing")])
    assert rows and {row.document for row in rows} == {"docs/drift.md"}
    assert all(row.split == "reserve" and row.answerable and row.answer for row in rows)
    assert all(row.passages is None for row in rows)  # retrieved when they are answered
    assert drawn([shown("Sizing")]) == rows and len(rows) <= 6
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert drawn([shown("Sizing"), shown("Drift")]) == []


def test_a_reserve_question_that_training_gives_away_is_left_out() -> None:
    (first, *_) = rows = drawn([shown("Sizing")])
    taught = shown("Sizing", question=first.question)
    assert first.question not in {row.question for row in drawn([taught])}
    answered = shown("Sizing", answer=first.answer, answerable=True, document="docs/x.md")
    assert first.answer not in {row.answer for row in drawn([answered])}
    assert len({row.answer for row in rows}) == len(rows)


def test_a_corpus_without_an_unseen_document_has_an_empty_reserve(paths: Any) -> None:
    assert run(paths)["reserve"] == []
