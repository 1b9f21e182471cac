"""index: the immutable vector index that retrieval and serving read.

In: chunks and their vectors. Out: a directory as ``resources.index`` describes it, its manifest
carrying recall@10 measured against exact search over the stored vectors. Below
``index.min_recall`` the stage fails: a graph that misses neighbours is not served. Above
``index.quantise_above`` chunks a build goes on from the one before: only changed chunks are handed
to the engine (resources/index/build.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import InputError, QualityError
from contracts.params import Index, Params
from contracts.records import Chunk
from contracts.settings import Settings
from resources.index import ShardCache, VectorIndex, build_index, certify, open_index
from stages import harness
from stages.tables import read_table
from stages.vectors import read_vectors

if TYPE_CHECKING:
    import numpy as np

#: Neighbours asked for when recall is measured.
K = 10

#: Two cosines closer than this are a tie: the engine sums in another order than numpy.
TIE = 1e-5

#: Probes of one matrix product: 3 times as fast as one by one, 40 MB at 500,000 chunks.
BLOCK = 20


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    rows = read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    ids, vectors, model = read_vectors(paths.vectors)
    check_pairs([row["chunk_id"] for row in rows], ids, paths.vectors)
    shards = ShardCache(Settings.from_env().caches_dir / "index-shards")
    manifest = build_index(paths.out, rows, vectors, params.index, model, shards)
    recall, least = measured(paths.out, vectors, params.index)
    if recall < params.index.min_recall and shards.reused:  # it may have aged
        shards.clear()
        manifest = build_index(paths.out, rows, vectors, params.index, model, shards)
        recall, least = measured(paths.out, vectors, params.index)
    certify(paths.out, {f"recall_at_{K}": recall, "worst_probe": least})
    harness.progress(
        f"{len(rows)} chunks, {manifest['kind']} search, recall@{K} {recall:.4f} against numpy, "
        f"content {manifest['content'][:16]}"
    )
    if recall < params.index.min_recall:
        raise QualityError(
            f"The index finds {recall:.4f} of the true {K} nearest neighbours; "
            f"{params.index.min_recall} is the least that is served.",
            where="params.yaml: index.min_recall",
            next="raise index.hnsw_m or index.ef_construct, or exact_below above the chunk count",
        )
    return {"chunks": float(len(rows)), f"recall_at_{K}": recall, "worst_probe": least}


def check_pairs(chunks: Sequence[str], vectors: Sequence[str], where: Path) -> None:
    """Chunks and vectors must name the same ids in the same order."""
    if list(chunks) == list(vectors):
        return
    odd = sorted(set(chunks) ^ set(vectors))
    raise InputError(
        f"Chunks and vectors do not belong together: {len(odd)} ids stand in only one of them"
        + ("." if odd else ", and their order differs."),
        offenders=odd[:20],
        where=str(where),
        next="run the stage vectors again",
    )


def measured(path: Path, vectors: np.ndarray, params: Index) -> tuple[float, float]:
    """:func:`measure_recall` of an index directory."""
    with open_index(path) as index:
        return measure_recall(index, vectors, params)


def measure_recall(index: VectorIndex, vectors: np.ndarray, params: Index) -> tuple[float, float]:
    """Mean and worst recall@10 of dense search, as served, against exact search in numpy.

    Probes lie half-way between two chunks, evenly spread over the index: near to the data as
    questions are, yet not themselves stored. A hit counts when its similarity reaches that of the
    true tenth neighbour, so that ties do not count as misses.
    """
    import numpy as np

    k, count = min(K, len(vectors)), min(params.probes, len(vectors))
    picks = np.linspace(0, len(vectors) - 1, count).astype(int)
    middle = vectors[picks] + vectors[picks[::-1]]
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-9)
    dense = params.search.model_copy(update={"mode": "dense"})
    shares = []
    for start in range(0, count, BLOCK):
        block = middle[start : start + BLOCK]
        bounds = np.partition(block @ vectors.T, -k, axis=1)[:, -k] - TIE
        for probe, bound in zip(block, bounds, strict=True):
            hits = index.search(probe, k, search=dense)
            shares.append(sum(hit.score >= bound for hit in hits) / k)
    return round(float(np.mean(shares)), 6), round(float(np.min(shares)), 6)


if __name__ == "__main__":
    harness.main("index", run, paths=("chunks", "vectors", "out"))
