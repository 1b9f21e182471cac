"""The golden questions about Dagster's docstrings and the pinned package keep their promises.

In: data/golden/dagster.yaml and the installed package. Out: a failure that lists every offender.
These questions measure retrieval only: stages/examples.py reads questions.yaml alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from contracts.records import Question
from stages.docstrings import docstrings, package_folder

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "data" / "golden" / "dagster.yaml"
PREFIX = "python:dagster/"  # "<uri of the source>/": how retrieval names its documents


def collapse(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def golden() -> list[Question]:
    return [Question.model_validate(row) for row in yaml.safe_load(GOLDEN.read_text("utf-8"))]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Path of a document -> its collapsed text."""
    folder = package_folder("dagster", ROOT / "requirements" / "cpu.lock")
    return {path: collapse(text) for path, text in docstrings("dagster", folder)}


def test_every_answer_stands_in_its_document_and_in_no_other(
    golden: list[Question], texts: dict[str, str]
) -> None:
    wrong = []
    for q in golden:
        path = (q.document or "").removeprefix(PREFIX)
        if not q.answer or q.answer != collapse(q.answer) or q.answer not in texts.get(path, ""):
            wrong.append(f"{q.id}: the answer does not stand in {q.document}")
        else:
            wrong += [
                f"{q.id}: also in {other}"
                for other, text in texts.items()
                if other != path and q.answer in text
            ]
    assert wrong == []


def test_answers_are_single_sentences(golden: list[Question]) -> None:
    wrong = [
        q.id
        for q in golden
        if not (q.answer or "").endswith(".")
        or re.search(r"[.?!] [A-Z]", q.answer or "")
        or not 4 <= len((q.answer or "").split()) <= 35
    ]
    assert wrong == []


def test_one_question_a_document_half_of_them_dev(golden: list[Question]) -> None:
    assert len({q.document for q in golden}) == len(golden) >= 24
    assert sum(q.split == "dev" for q in golden) == len(golden) / 2
    assert [q.id for q in golden] == [f"dagster-{n:02d}" for n in range(1, len(golden) + 1)]
    assert all(q.answerable and q.document and q.section in ("", "Args") for q in golden)
