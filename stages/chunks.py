"""chunks: accepted documents cut into passages that the embedding model can read.

In: ``documents.parquet`` of the stage quality. Out: a Parquet file with one row a chunk, columns as
``contracts.records.Chunk``, in the order of documents and offsets. ``text`` is byte for byte
``document.text[start:end]``, no non-space character is lost, and ``tokens`` is exact under the
embedding model's own tokenizer, which cuts silently at 256.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import text_sha
from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Document
from resources.embedding import find_model, load_tokenizer
from stages import harness
from stages.splitting import WordCounter, split
from stages.tables import read_table, write_rows

if TYPE_CHECKING:
    import pyarrow as pa


def schema() -> pa.Schema:
    """The columns of ``contracts.records.Chunk``."""
    import pyarrow as pa

    text = ("chunk_id", "doc_id", "source", "path", "title", "heading")
    return pa.schema(
        [(name, pa.string()) for name in text]
        + [(name, pa.int64()) for name in ("start", "end", "tokens")]
        + [(name, pa.string()) for name in ("text_sha", "text")]
    )


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    counter = WordCounter(load_tokenizer(find_model(params.vectors.model)))
    documents = read_documents(paths.documents / "documents.parquet")
    clock = time.monotonic()
    rows = [row for doc in documents for row in chunk_rows(doc, params.chunks.max_tokens, counter)]
    seconds = max(time.monotonic() - clock, 1e-9)
    if not rows:
        raise InputError(
            "No document holds any text to cut.",
            where=str(paths.documents),
            next="look at data/quality/report.html",
        )
    write_rows(paths.out, rows, schema())
    size = sum(len(doc.text.encode()) for doc in documents)
    tokens = sum(row["tokens"] for row in rows)
    harness.progress(
        f"{len(documents)} documents, {size / 1e6:.2f} MB -> {len(rows)} chunks, "
        f"{tokens:,} tokens; {size / 1e6 / seconds:.1f} MB/s"
    )
    return {
        "chunks": float(len(rows)),
        "tokens": float(tokens),
        "mean_tokens": round(tokens / len(rows), 2),
        "max_tokens": float(max(row["tokens"] for row in rows)),
    }


def read_documents(path: Path) -> list[Document]:
    """The accepted documents, in file order. Raises InputError."""
    table = read_table(path, list(Document.model_fields))
    return [Document.model_validate(row) for row in table.to_pylist()]


def chunk_rows(
    document: Document, max_tokens: int, counter: WordCounter
) -> Iterator[dict[str, Any]]:
    """The chunks of one document as rows of :func:`schema`."""
    markdown = document.path.endswith(".md")
    for span in split(document.text, max_tokens, counter, markdown):
        text = document.text[span.start : span.end]
        yield {
            "chunk_id": f"{document.doc_id}#{span.start}-{span.end}",
            "doc_id": document.doc_id,
            "source": document.source,
            "path": document.path,
            "title": document.title,
            "heading": span.heading,
            "start": span.start,
            "end": span.end,
            "tokens": span.tokens,
            "text_sha": text_sha(text),
            "text": text,
        }


if __name__ == "__main__":
    harness.main("chunks", run, paths=("documents", "out"))
