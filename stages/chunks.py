"""chunks: accepted documents cut into passages that the embedding model can read.

In: ``documents.parquet`` of the stage quality. Out: a Parquet file with one row a chunk, columns as
``contracts.records.Chunk``, in the order of documents and offsets. ``text`` is byte for byte
``document.text[start:end]``, no non-space character is lost, and ``tokens`` is exact under the
embedding model's own tokenizer, which cuts silently at 256.

Where a document is cut follows from its text and structure, the parameters, the tokenizer and the
code of ``stages.splitting``: under the hash of all of these a cache keeps the spans, so a re-run
splits only documents that changed. Rows are the same bytes from the cache, from one process, from
several and from Ray.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import text_sha
from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Document
from contracts.settings import Settings
from resources.content_cache import ContentCache
from resources.embedding import available_threads, counting_model, find_model
from stages import harness, splitting
from stages import markdown as markdown_module
from stages.splitting import Strategy, WordCounter, split
from stages.splitting.work import Item, Recipe, split_batch
from stages.tables import read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

#: Characters of text a batch: what a process or a Ray task gets at once, and what an interrupted
#: run loses of each.
BATCH = 1_000_000

#: Characters of text that pay for one more process: starting it costs what 3 MB cost to split.
PER_PROCESS = 6_000_000

#: (start, end, tokens, heading)
Spans = list[tuple[int, int, int, str]]


def schema() -> pa.Schema:
    """The columns of ``contracts.records.Chunk``."""
    import pyarrow as pa

    text = ("chunk_id", "doc_id", "source", "path", "title", "heading")
    return pa.schema(
        [(name, pa.string()) for name in text]
        + [(name, pa.int64()) for name in ("start", "end", "tokens")]
        + [(name, pa.string()) for name in ("text_sha", "text", "format", "language", "licence")]
    )


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    import pyarrow as pa

    documents = read_documents(paths.documents / "documents.parquet")
    block = params.chunks
    recipe = Recipe(counting_model(params.vectors), block.max_tokens, block.strategy)
    clock = time.monotonic()
    cache = ContentCache(Settings.from_env().caches_dir / "chunks.sqlite")
    try:
        spans, new = find_spans(documents, recipe, cache, block.engine)
    finally:
        cache.close()
    columns: dict[str, list[Any]] = {name: [] for name in schema().names}
    for document, found in zip(documents, spans, strict=True):
        for row in rows_of(document, found):
            for name, value in row.items():
                columns[name].append(value)
    seconds = max(time.monotonic() - clock, 1e-9)
    count, tokens = len(columns["tokens"]), sum(columns["tokens"])
    if not count:
        raise InputError(
            "No document holds any text to cut.",
            where=str(paths.documents),
            next="look at data/quality/report.html",
        )
    write_table(paths.out, pa.table(columns, schema=schema()))
    size = sum(len(document.text) for document in documents)
    harness.progress(
        f"{len(documents)} documents ({new} new), {size / 1e6:.2f} M characters -> {count} chunks, "
        f"{tokens:,} tokens; {size / 1e6 / seconds:.1f} M characters/s"
    )
    return {
        "chunks": float(count),
        "tokens": float(tokens),
        "mean_tokens": round(tokens / count, 2),
        "max_tokens": float(max(columns["tokens"])),
    }


def read_documents(path: Path) -> list[Document]:
    """The accepted documents, in file order. Raises InputError."""
    table = read_table(path, list(Document.model_fields))
    return [Document.model_validate(row) for row in table.to_pylist()]


def find_spans(
    documents: Sequence[Document], recipe: Recipe, cache: ContentCache, engine: str
) -> tuple[list[Spans], int]:
    """The spans of each document, and how many documents were not in the cache."""
    base = recipe_digest(recipe)
    keys = [document_key(document, base) for document in documents]
    known = cache.get(sorted(set(keys)))
    new = {
        key: Item(document.text, document.format, document.language, document.headings)
        for key, document in zip(keys, documents, strict=True)
        if key not in known
    }
    for fresh in _split_all(new, recipe, engine):
        cache.put(fresh)  # before the next is waited for: an interrupted run goes on from here
        known.update(fresh)
    return [json.loads(known[key]) for key in keys], len(new)


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of all that spans follow from besides the document: recipe, tokenizer, code."""
    digest = hashlib.sha256(repr(recipe).encode())
    digest.update(f"{sys.version_info[:3]} {version('tokenizers')}".encode())
    package = Path(splitting.__file__).parent
    files = [find_model(recipe.model) / "tokenizer.json", Path(markdown_module.__file__)]
    for path in (*files, *sorted(package.glob("*.py"))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def document_key(document: Document, base: str) -> str:
    """SHA-256 of what a document's spans follow from."""
    headings = [[item.level, item.title, item.start] for item in document.headings]
    shape = json.dumps([base, document.format, document.language, headings])
    return hashlib.sha256(f"{shape}\0{text_sha(document.text)}".encode()).hexdigest()


def _split_all(
    items: Mapping[str, Item], recipe: Recipe, engine: str
) -> Iterator[dict[str, bytes]]:
    """Spans by key, batch by batch, on as many processes as pay, or on a Ray cluster."""
    keys = list(_batches(items))
    batches = [[items[key] for key in part] for part in keys]
    work = partial(split_batch, recipe)
    if engine == "ray" and batches:
        from resources.ray_data import stream

        for number, found in stream(batches, work):
            yield dict(zip(keys[number], found, strict=True))
        return
    size = sum(len(item.text) for item in items.values())
    processes = min(available_threads(), size // PER_PROCESS)
    if processes < 2:
        for part, found in zip(keys, map(work, batches), strict=True):
            yield dict(zip(part, found, strict=True))
        return
    # Spawned, not forked: pyarrow and the tokenizers have threads by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for part, found in zip(keys, pool.map(work, batches), strict=True):
                yield dict(zip(part, found, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(items: Mapping[str, Item]) -> Iterator[list[str]]:
    """Keys of about :data:`BATCH` characters of text together."""
    part: list[str] = []
    size = 0
    for key, item in items.items():
        part.append(key)
        size += len(item.text)
        if size >= BATCH:
            yield part
            part, size = [], 0
    if part:
        yield part


def chunk_rows(
    document: Document, max_tokens: int, counter: WordCounter, strategy: Strategy = "structure"
) -> Iterator[dict[str, Any]]:
    """The chunks of one document as rows of :func:`schema`, without a cache."""
    found = split(
        document.text,
        max_tokens,
        counter,
        format=document.format,
        strategy=strategy,
        language=document.language,
        headings=document.headings,
    )
    return rows_of(document, ((one.start, one.end, one.tokens, one.heading) for one in found))


def rows_of(
    document: Document, spans: Iterable[tuple[int, int, int, str]]
) -> Iterator[dict[str, Any]]:
    """Spans of a document as rows of :func:`schema`."""
    for start, end, tokens, heading in spans:
        text = document.text[start:end]
        yield {
            "chunk_id": f"{document.doc_id}#{start}-{end}",
            "doc_id": document.doc_id,
            "source": document.source,
            "path": document.path,
            "title": document.title,
            "heading": heading,
            "start": start,
            "end": end,
            "tokens": tokens,
            "text_sha": text_sha(text),
            "text": text,
            "format": document.format,
            "language": document.language,
            "licence": document.licence,
        }


if __name__ == "__main__":
    harness.main("chunks", run, paths=("documents", "out"))
