"""Chunks and text-like vectors by the ten thousand, for the benchmarks of search.

Real embeddings of 50,000 chunks cost six minutes of CPU. So 2,000 docstrings of the installed
package dagster are embedded, and each further vector is a mixture of two of them (60 : 40) with
noise of length 0.3: text-like, in that neighbours exist and clusters are uneven, but made.
Held-out real docstrings, never mixed in, are the queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import package_docs
from contracts.digests import text_sha
from contracts.records import Chunk
from contracts.settings import Settings
from resources.embedding import Embedder

REAL, QUERIES = 2000, 200


def docstrings() -> list[str]:
    """The docstrings of dagster, cut at 500 characters, in file order."""
    found = (
        one for file in package_docs.sources("dagster") for one in package_docs.docstrings(file)
    )
    return list(dict.fromkeys(text[:500] for name, text in found if name and len(text) > 60))


def text_like(count: int, seed: int = 7) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """(texts, vectors (count, 384) float32 of length 1, questions, their vectors)."""
    texts = docstrings()[: REAL + QUERIES]
    embedder = Embedder("all-MiniLM-L6-v2", "bfloat16", Settings.from_env().embeddings_dir)
    real = np.asarray(embedder.embed(texts))
    base, asked = real[: -QUERIES or None], real[-QUERIES:]
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, len(base), (2, count))
    vectors = 0.6 * base[first] + 0.4 * base[second]
    noise = draw.normal(size=vectors.shape).astype(np.float32)
    vectors += 0.3 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mixed = [f"{texts[a][:250]} {texts[b][:250]}" for a, b in zip(first, second, strict=True)]
    return mixed, vectors.astype(np.float32), texts[-QUERIES:], asked


def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Chunks of those texts, five to a document, as their Parquet rows."""
    found = []
    for number, text in enumerate(texts):
        doc_id, start = f"made:{number // 5:06}.md", number % 5 * 1000
        found.append(
            Chunk(
                chunk_id=f"{doc_id}#{start}-{start + len(text)}", doc_id=doc_id, source="made",
                path=doc_id[5:], title="Made", heading="Made", start=start, end=start + len(text),
                tokens=len(text) // 4, text_sha=text_sha(text), text=text, format="markdown",
                language="en",
            ).model_dump()
        )  # fmt: skip
    return found
