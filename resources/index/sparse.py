"""Words as sparse vectors, for BM25 with the engine's own inverse document frequencies.

qdrant-edge brings the tokenizer, stop words and stemmer of Qdrant's own BM25 (100,000 chunks a
second; the same text gives the same vector everywhere). Both engines store and ask these vectors,
so both give the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from resources.embedding import context_of

#: Tokens of a chunk, about: BM25 weighs a chunk's length against it.
AVERAGE_TOKENS = 64.0

#: What decides how a text becomes a vector; stands in the manifest and in the content id.
RECIPE = {"model": "qdrant bm25, english", "k": 1.2, "b": 0.75, "avg_len": AVERAGE_TOKENS}


@cache
def _model() -> Any:
    import qdrant_edge as edge

    config = edge.Bm25Config(k=1.2, b=0.75, avg_len=AVERAGE_TOKENS, language="english")
    return edge.Bm25(config)


def sparse_text(row: Mapping[str, Any]) -> str:
    """The words of a chunk: title and headings, then the text, as for its dense vector."""
    return f"{context_of(row['title'], row['heading'])}\n{row['text']}"


def of_document(row: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Token hashes, ascending, and their BM25 weights without the document frequencies."""
    return _pairs(_model().embed_document(sparse_text(row)))


def of_query(text: str) -> tuple[list[int], list[float]]:
    """As :func:`of_document`; empty when nothing but stop words was asked."""
    return _pairs(_model().embed_query(text))


def _pairs(vector: Any) -> tuple[list[int], list[float]]:
    pairs = sorted(zip(vector.indices, vector.values, strict=True))
    return [index for index, _ in pairs], [value for _, value in pairs]
