"""Retrieval to passages to citations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InputError
from contracts.records import REFUSAL, Chunk, Filter, Passage
from resources.prompts import PromptVersion
from resources.rag import Rag, cite, is_refusal, passages_of, unresolved

PROMPT = PromptVersion.of(
    "answer", "v1",
    "{% block system %}{% for p in passages %}[{{ p.n }}] {{ p.text }}\n{% endfor %}{% endblock %}"
    "{% block user %}{{ question }}{% endblock %}",
)  # fmt: skip


@dataclass
class Hit:
    chunk: Chunk
    score: float


def chunk(n: int, doc_id: str = "docs:a.md", text: str = "One\n  two.") -> Chunk:
    return Chunk(
        chunk_id=f"{doc_id}#{n}-{n + 9}", doc_id=doc_id, source="docs", path="a.md", title="A",
        heading="Top > Sub", start=n, end=n + 9, tokens=3, text_sha="0" * 64, text=text,
    )  # fmt: skip


class Index:
    def __init__(self, hits: list[Hit]) -> None:
        self.hits, self.asked = hits, 0

    def search(self, vector: Any, k: int, **_: Any) -> list[Hit]:
        self.asked += 1
        return self.hits[:k]


class Embedder:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed(self, texts: list[str]) -> Any:
        self.texts += texts
        return np.zeros((len(texts), 4), np.float32)

    embed_questions = embed


def passages(count: int = 3) -> list[Passage]:
    return passages_of([Hit(chunk(n * 10), 0.9 - n / 10) for n in range(count)])


def test_passages_are_numbered_best_first_and_cut_at_the_floor() -> None:
    index = Index([Hit(chunk(n * 10), score) for n, score in enumerate((0.9, 0.5, 0.19, 0.1))])
    embedder = Embedder()
    rag = Rag(index, embedder, PROMPT, top_k=3, min_score=0.2)
    found = rag.retrieve("  Why?\n")
    assert embedder.texts == ["Why?"]
    assert [(p.n, p.chunk_id, p.text, p.score) for p in found] == [
        (1, "docs:a.md#0-9", "One two.", 0.9), (2, "docs:a.md#10-19", "One two.", 0.5)]  # fmt: skip
    assert rag.messages("Why?", found)[0]["content"] == "[1] One two.\n[2] One two."
    assert Rag(index, embedder, PROMPT, top_k=3, min_score=0.95).retrieve("x") == []


def test_many_questions_are_embedded_in_one_call() -> None:
    index, embedder = Index([Hit(chunk(0), 0.9)]), Embedder()
    rag = Rag(index, embedder, PROMPT, top_k=1, min_score=0)
    assert len(rag.retrieve_many(["a", "b", "c"])) == 3 == index.asked
    assert rag.retrieve_many([]) == [] and embedder.texts == ["a", "b", "c"]


class Spelling:
    """Vectors that count the letters a, b and c: likeness that a reader can check."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, texts: list[str]) -> Any:
        self.calls.append(texts)
        rows = np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    embed_questions = embed


def test_the_index_is_given_the_question_and_what_may_be_shown() -> None:
    """Words are searched by the text; tombstones are asked for at every search."""

    class Recording(Index):
        def search(self, vector: Any, k: int, **given: Any) -> list[Hit]:
            found.append((given["text"], given["only"]))
            return super().search(vector, k)

    found: list[Any] = []
    refused = [None, Filter(without_documents=["docs:a.md"])]
    rag = Rag(Recording([]), Embedder(), PROMPT, top_k=1, min_score=0, only=lambda: refused[0])
    rag.retrieve(" How? ")
    refused.reverse()
    rag.retrieve("Why?")
    assert found == [("How?", None), ("Why?", Filter(without_documents=["docs:a.md"]))]


def test_sentences_most_like_the_question_are_shown_best_first() -> None:
    texts = ("Baaaaa aaaaaaaaa. Bbbbbbb aabbbbbbb.", "Ccccc cccccccccc. Baaaaa aaaaaaaaa.")
    hits = [Hit(chunk(n * 10, text=text), 0.5) for n, text in enumerate(texts)]
    embedder = Spelling()
    rag = Rag(Index(hits), embedder, PROMPT, top_k=2, min_score=0.1, sentences=2)
    found = rag.retrieve("aaa")
    assert [(p.n, p.text, p.chunk_id) for p in found] == [
        (1, "Baaaaa aaaaaaaaa.", "docs:a.md#0-9"),  # said twice, shown once, as of the better chunk
        (2, "Bbbbbbb aabbbbbbb.", "docs:a.md#0-9"),
    ]
    assert found[0].score > found[1].score >= 0.1
    assert [len(call) for call in embedder.calls] == [1, 3]  # questions, then distinct sentences
    assert rag.retrieve("ccc")[0].text == "Ccccc cccccccccc."
    nothing = Rag(Index(hits), embedder, PROMPT, top_k=2, min_score=1.01, sentences=2)
    assert nothing.retrieve("aaa") == []
    assert Rag(Index([]), embedder, PROMPT, top_k=2, min_score=0, sentences=2).retrieve("a") == []


@pytest.mark.parametrize(
    ("answer", "cited", "unknown"),
    [
        ("One. [1] Two. [3]", [1, 3], []),
        ("Two [2], again [2] and [1].", [2, 1], []),
        ("Both. [1, 2][3]", [1, 2, 3], []),
        ("Made up. [4] [0] [99]", [], [4, 0, 99]),
        ("Mixed [2,7]", [2], [7]),
        ("See list[1] of foo[a], [x], [1.5], [-1], [1234].", [1], []),
        ("", [], []),
        (REFUSAL, [], []),
    ],
)
def test_citations_are_resolved_or_reported(
    answer: str, cited: list[int], unknown: list[int]
) -> None:
    found = cite(answer, passages())
    assert [citation.n for citation in found] == cited
    assert unresolved(answer, passages()) == unknown


def test_a_citation_says_where_its_text_is() -> None:
    (first, *_) = cite("[2]", passages())
    assert (first.doc_id, first.start, first.end, first.path, first.heading) == (
        "docs:a.md", 10, 19, "a.md", "Top > Sub")  # fmt: skip


def test_a_document_id_may_hold_the_separator() -> None:
    (found,) = cite("[1]", passages_of([Hit(chunk(3, "python:a#b.c"), 0.5)]))
    assert (found.doc_id, found.start, found.end) == ("python:a#b.c", 3, 12)


def test_a_chunk_id_of_another_form_is_an_error() -> None:
    odd = passages()[0].model_copy(update={"chunk_id": "docs:a.md"})
    with pytest.raises(InputError, match="not <doc_id>#<start>-<end>"):
        cite("[1]", [odd])


@given(st.text(max_size=300))
def test_any_answer_can_be_cited(answer: str) -> None:
    known = cite(answer, passages())
    assert {citation.n for citation in known} <= {1, 2, 3}
    assert not {1, 2, 3} & set(unresolved(answer, passages()))


def test_a_refusal_is_the_sentence_and_nothing_else() -> None:
    assert is_refusal(REFUSAL) and is_refusal(f"  {REFUSAL}\n") and is_refusal(f"{REFUSAL} [1]")
    assert not is_refusal("") and not is_refusal(f"{REFUSAL} But I think so.")
    assert not is_refusal("the documents do not say.")
