"""Search at 50,000 vectors against qdrant-client's local mode, in one run.

``python -m benchmarks.search``. Text-like vectors: see ``benchmarks.knowledge``. Both hold the same
points with the same payload and return ten chunks with it; queries are held-out real docstrings.
Ours is measured as params.yaml serves that many (an int8 scan, rescored) and, for comparison, with
the float32 scan of smaller indexes. Target: p50 at most 1/20 of the peer's, recall@10 at least 0.98
against numpy.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.knowledge import rows, text_like
from contracts import offline
from contracts.params import Index, Search, load_params
from contracts.settings import ROOT
from resources.index import EdgeIndex, build_index, open_index

COUNT, K, SHARE, RECALL = 50_000, 10, 1 / 20, 0.98
PEER_QUERIES = 20  # at 0.2 s each
MODEL = {"name": "all-MiniLM-L6-v2", "dtype": "bfloat16", "digest": "benchmark", "dimension": 384}


def p50(ask: Callable[[int], Any], count: int) -> float:
    """Median milliseconds of ``ask(0) … ask(count - 1)``; the first three calls warm up."""
    times = []
    for number in [0, 1, 2, *range(count)]:
        clock = time.perf_counter()
        ask(number)
        times.append(time.perf_counter() - clock)
    return float(np.median(times[3:])) * 1000


def peer(payloads: list[dict[str, Any]], vectors: np.ndarray, asked: np.ndarray) -> float:
    """p50 of qdrant-client's local mode."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    client.create_collection(
        "peer", models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
    )
    client.upload_collection("peer", vectors=vectors, payload=payloads, batch_size=5000)
    return p50(
        lambda n: client.query_points("peer", query=asked[n].tolist(), limit=K).points,
        PEER_QUERIES,
    )


def recall(index: EdgeIndex, vectors: np.ndarray, asked: np.ndarray, how: Search) -> float:
    """Share of hits as near as numpy's true tenth neighbour; ties count."""
    shares = []
    for query in asked:
        bound = np.partition(vectors @ query, -K)[-K] - 1e-5
        shares.append(sum(hit.score >= bound for hit in index.search(query, K, search=how)) / K)
    return float(np.mean(shares))


def main() -> int:
    offline.apply()
    params = load_params(ROOT / "params.yaml").index
    texts, vectors, questions, asked = text_like(COUNT)
    payloads = rows(texts)
    theirs = peer(payloads, vectors, asked)
    lines, ok = [f"{'qdrant-client local':28} {theirs:8.2f} ms"], True
    exact = params.model_copy(update={"quantise_above": COUNT})
    for name, variant in {"as served": params, "float32 scan": exact}.items():
        found, reached = measure(name, variant, payloads, vectors, questions, asked, theirs)
        lines += found
        ok &= reached or name != "as served"
    print(f"\n{COUNT} vectors of 384 dimensions, top {K} with payload, one thread")
    print("\n".join(lines))
    print("PASS" if ok else "FAIL", f"(dense p50 <= {SHARE:.3f} of the peer, recall >= {RECALL})")
    return 0 if ok else 1


def measure(
    name: str,
    params: Index,
    payloads: list[dict[str, Any]],
    vectors: np.ndarray,
    questions: list[str],
    asked: np.ndarray,
    theirs: float,
) -> tuple[list[str], bool]:
    """Build, search, and say how it went."""
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        manifest = build_index(Path(folder) / "index", payloads, vectors, params, MODEL)
        built = time.perf_counter() - clock
        clock = time.perf_counter()
        with open_index(Path(folder) / "index") as index:
            opened = time.perf_counter() - clock
            dense = Search(mode="dense", ef=params.search.ef)
            share = recall(index, vectors, asked, dense)
            lines, ok = [], True
            for mode in ("dense", "sparse", "fused"):
                how = Search(mode=mode, ef=params.search.ef)
                ours = p50(
                    lambda n, how=how: index.search(  # type: ignore[misc]
                        asked[n], K, text=questions[n], search=how
                    ),
                    len(asked),
                )
                lines.append(
                    f"{f'{name}, {mode}':28} {ours:8.2f} ms   1/{theirs / ours:.0f} of the peer"
                )
                if mode == "dense":
                    lines[-1] += f", {manifest['kind']}, recall@{K} {share:.4f}"
                    lines[-1] += f", built in {built:.1f} s, opened in {opened:.2f} s"
                    ok = ours <= theirs * SHARE and share >= RECALL
    return lines, ok


if __name__ == "__main__":
    sys.exit(main())
