"""Retrieval-augmented answering without the engine: the same code offline and behind the gateway.

In: a question, an opened index, an embedder, a prompt version. Out: numbered passages, the chat
messages to send, and the citations of the answer that came back. Both sides share it so that what
the gate certified is what users get.

Passages are whole chunks, or with ``sentences`` the sentences of those chunks which are most like
the question, best first: a small model that has to find one line among twelve finds it far less
often than one among five in order (the test questions of our guide: the best sentence holds the
answer for 41 %, the best five for 61 %; the five chunks hold it for 71 %).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from contracts.errors import InputError
from contracts.records import REFUSAL, Chunk, Citation, Filter, Passage
from resources.prompts import Message, PromptVersion
from resources.sentences import sentences as split_sentences

#: ``[2]`` or ``[1, 3]``: how an answer names its passages.
CITATION = re.compile(r"\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")


class Hit(Protocol):
    """A chunk and its cosine similarity to the query."""

    @property
    def chunk(self) -> Chunk: ...
    @property
    def score(self) -> float: ...


class Searches(Protocol):
    """What is needed of an index (resources.index.VectorIndex)."""

    def search(
        self, vector: Any, k: int, *, text: str | None = None, only: Filter | None = None
    ) -> Sequence[Hit]: ...


class Embeds(Protocol):
    """What is needed of an embedder (resources.embedding.Embedder)."""

    def embed(self, texts: list[str]) -> Any: ...
    def embed_questions(self, texts: list[str]) -> Any: ...


class Rag:
    """Questions to passages to messages, with one release's index and prompt.

    Args:
        index: opened vector index.
        embedder: of the model that the index was built with.
        prompt: the version to render.
        top_k: chunks to find, at most.
        min_score: cosine similarity to the question below which a passage is not shown.
        sentences: how many sentences of the chunks to show; None shows the chunks.
        only: asked at every search, which chunks may be found: the gateway passes
            ``resources.published.Tombstones``, so that no answer shows a deleted document.
    """

    def __init__(
        self,
        index: Searches,
        embedder: Embeds,
        prompt: PromptVersion,
        *,
        top_k: int,
        min_score: float,
        sentences: int | None = None,
        only: Callable[[], Filter | None] = lambda: None,
    ) -> None:
        self.index, self.embedder, self.prompt, self.only = index, embedder, prompt, only
        self.top_k, self.min_score, self.sentences = top_k, min_score, sentences

    def retrieve(self, question: str) -> list[Passage]:
        """Passages, best first, numbered from 1. Empty: answer with REFUSAL."""
        return self.retrieve_many([question])[0]

    def retrieve_many(self, questions: Sequence[str]) -> list[list[Passage]]:
        """:meth:`retrieve` for several questions with one call of the embedder."""
        if not questions:
            return []
        texts = [question.strip() for question in questions]
        vectors, only = self.embedder.embed_questions(texts), self.only()
        hits = [
            self.index.search(vector, self.top_k, text=text, only=only)
            for vector, text in zip(vectors, texts, strict=True)
        ]
        if self.sentences is None:
            return [passages_of(found, self.min_score) for found in hits]
        chunks = [[hit.chunk for hit in found] for found in hits]
        return narrow(vectors, chunks, self.embedder, self.sentences, self.min_score)

    def messages(self, question: str, passages: Sequence[Passage]) -> list[Message]:
        """The chat messages to send to the engine."""
        return self.prompt.messages(question, passages)

    def close(self) -> None:
        """Give the index's files back, where it holds any."""
        close = getattr(self.index, "close", None)
        if close is not None:
            close()


def passages_of(hits: Sequence[Hit], min_score: float = -1.0) -> list[Passage]:
    """Hits as numbered passages; those under ``min_score`` are left out."""
    kept = [hit for hit in hits if hit.score >= min_score]
    return [
        _passage(n, hit.chunk, " ".join(hit.chunk.text.split()), float(hit.score))
        for n, hit in enumerate(kept, start=1)
    ]


def _passage(n: int, chunk: Chunk, text: str, score: float) -> Passage:
    return Passage(
        n=n,
        chunk_id=chunk.chunk_id,
        path=chunk.path,
        title=chunk.title,
        heading=chunk.heading,
        text=text,
        score=score,
    )


def narrow(
    questions: Any,
    chunks: Sequence[Sequence[Chunk]],
    embedder: Embeds,
    count: int,
    min_score: float,
) -> list[list[Passage]]:
    """The ``count`` sentences of each question's chunks that are most like it, as passages.

    Args:
        questions: unit rows, (n, d) float32.
        chunks: the chunks found for each of the n questions.
        embedder: called once, with every distinct sentence.
        count: sentences to keep for a question, at most.
        min_score: cosine similarity below which a sentence is not kept.
    """
    pieces = [[(c, s) for c in found for s in split_sentences(c.text)] for found in chunks]
    texts = list(dict.fromkeys(sentence for found in pieces for _, sentence in found))
    if not texts:
        return [[] for _ in chunks]
    rows = embedder.embed(texts)
    row_of = dict(zip(texts, rows, strict=True))
    narrowed = []
    for question, found in zip(questions, pieces, strict=True):
        distinct = {sentence: chunk for chunk, sentence in reversed(found)}
        scored = [(float(question @ row_of[s]), s, c) for s, c in distinct.items()]
        scored.sort(key=lambda item: (-item[0], item[1]))
        kept = [item for item in scored if item[0] >= min_score][:count]
        narrowed.append(
            [_passage(n, chunk, text, score) for n, (score, text, chunk) in enumerate(kept, 1)]
        )
    return narrowed


def cited_numbers(answer: str) -> list[int]:
    """Every number in brackets, in order of first appearance."""
    found = (int(n) for group in CITATION.findall(answer) for n in group.split(","))
    return list(dict.fromkeys(found))


def resolved(answer: str, passages: Sequence[Passage]) -> list[int]:
    """Cited numbers that a passage has."""
    known = {passage.n for passage in passages}
    return [n for n in cited_numbers(answer) if n in known]


def cite(answer: str, passages: Sequence[Passage]) -> list[Citation]:
    """The passages that the answer names. Numbers without a passage are in :func:`unresolved`."""
    by_number = {passage.n: passage for passage in passages}
    return [_citation(by_number[n]) for n in resolved(answer, passages)]


def unresolved(answer: str, passages: Sequence[Passage]) -> list[int]:
    """Cited numbers that no passage has: the model made them up."""
    known = {passage.n for passage in passages}
    return [n for n in cited_numbers(answer) if n not in known]


def is_refusal(answer: str) -> bool:
    """Whether the answer is the refusal, whitespace and citations aside."""
    return " ".join(CITATION.sub("", answer).split()) == REFUSAL


def _citation(passage: Passage) -> Citation:
    """Offsets and document come from the chunk id, ``<doc_id>#<start>-<end>``."""
    doc_id, _, span = passage.chunk_id.rpartition("#")
    start, _, end = span.partition("-")
    if not (doc_id and start.isdigit() and end.isdigit()):
        raise InputError(
            "A chunk id is not <doc_id>#<start>-<end>.",
            where=passage.chunk_id,
            next="rebuild chunks and index: `dvc repro index`",
        )
    return Citation(
        n=passage.n,
        chunk_id=passage.chunk_id,
        doc_id=doc_id,
        path=passage.path,
        heading=passage.heading,
        start=int(start),
        end=int(end),
        text=passage.text,
    )
