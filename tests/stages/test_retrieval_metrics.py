"""Relevance and metrics by hand; intervals that know that questions share documents."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.records import Question
from stages.retrieval_metrics import Result, has_answer, in_section, scores, summarise

FOLDERS = {"docs": "docs"}


def question(**changes: Any) -> Question:
    base = {
        "id": "q",
        "question": "What is the verdict?",
        "document": "docs/gates.md",
        "section": "Verdicts",
        "answer": "A missing score is INVALID.",
        "split": "dev",
        "answerable": True,
    }
    return Question.model_validate(base | changes)


def hit(path: str, heading: str, text: str) -> Any:
    return SimpleNamespace(source="docs", path=path, heading=heading, text=text)


def test_what_is_relevant() -> None:
    asked = question(answer="It holds\n two lines.")
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


def test_a_docstring_names_its_source_and_has_a_section_above_its_first_heading() -> None:
    asked = question(document="python:dagster/dagster.op", section="", answer="An op does work.")
    chunk = hit("dagster.op", "", "x")
    chunk.source = "dagster"
    assert in_section(asked, chunk, {"dagster": "python:dagster"})
    chunk.heading = "Args"
    assert not in_section(asked, chunk, {"dagster": "python:dagster"})


def result(marks: list[bool], relevant: int = 2, document: str = "docs/gates.md") -> Result:
    return Result(question(document=document), [], marks, [False] * len(marks), relevant)


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
    assert result([False, True]).rank == 2 and result([False]).rank is None


def width(results: list[Result]) -> float:
    pair = summarise(results, [1]).intervals["recall_at_1"]
    assert pair is not None and pair[0] < 0.5 < pair[1]
    return pair[1] - pair[0]


def test_intervals_narrow_with_more_documents_and_not_with_more_questions_of_the_same() -> None:
    few = [result([n % 2 == 0], document=f"docs/{n}.md") for n in range(10)]
    many = [result([n % 2 == 0], document=f"docs/{n}.md") for n in range(200)]
    again = few * 20  # the same ten documents, which stand or fall as a whole
    assert width(many) < 0.2 < 0.5 < width(few)
    assert width(again) == pytest.approx(width(few), abs=0.01)
    assert summarise(few, [1]) == summarise(few, [1])


def test_one_document_gives_no_interval_and_no_question_no_metric() -> None:
    alone = summarise([result([True]), result([False])], [1])
    assert (alone.questions, alone.documents, alone.metrics["recall_at_1"]) == (2, 1, 0.5)
    assert alone.intervals["recall_at_1"] is None
    assert alone.as_json()["recall_at_1"] == [0.5, None, None]
    nothing = Result(question(answerable=False), [], [False], [False], 0)
    assert summarise([nothing], [1]).as_json() == {"questions": 0, "documents": 0}


def test_a_document_with_more_questions_weighs_more() -> None:
    """As in the mean: 9 hits from one page and a miss from another are 0.9, not 0.5."""
    found = summarise([result([True])] * 9 + [result([False], document="docs/b.md")], [1])
    assert found.metrics["recall_at_1"] == 0.9
    assert found.intervals["recall_at_1"] == (0.0, 1.0)
