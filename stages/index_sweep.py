"""index_sweep: what recall, latency and memory HNSW gives on this corpus, against exact search.

In: chunks and their vectors, at most ``index_sweep.vectors`` of them, spread evenly. Out: a folder
with sweep.json, sweep.png and report.html. Every graph of the grid is built and searched as the
stage index would do it, by ``resources.index``; the graph of params.yaml's block index is among
them. Timings differ from run to run, so nothing depends on this folder and a release does not name
it: it is evidence, as the profile is (docs/decisions/0005-profile-is-evidence.md).

recall@10 is against exact search in numpy, over queries half-way between two chunks, as for the
index. Latency is that of one whole search in this process, payload included. Memory is what the
search maps: the graph's files, and the vectors. The searches ask for a few more than ten (ties are
broken by us), and the engine raises ef to what is asked for, so an ef below 26 changes nothing.

Of all points that reach ``index.min_recall`` the sweep picks one: within 10 % of the fastest (which
is noise), the smallest graph, then the fastest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.params import Index, IndexSweep, Params, Search
from contracts.records import Chunk
from resources.index import EdgeIndex, build_index, open_index
from stages import harness
from stages.index import TIE, K, check_pairs
from stages.tables import read_table
from stages.vectors import read_vectors

if TYPE_CHECKING:
    import numpy as np

#: Points this much slower than the fastest are as fast: runs differ by as much.
NOISE = 0.1


@dataclass(frozen=True)
class Point:
    """One graph searched with one ef; exact search has none of the three."""

    hnsw_m: int | None
    ef_construct: int | None
    ef: int | None
    recall: float  # recall@10, mean over the queries
    p50_ms: float
    p95_ms: float
    graph_bytes: int
    build_seconds: float
    own: bool = False  # the graph and ef of params.yaml: index


@dataclass(frozen=True)
class Sweep:
    vectors: int
    dimension: int
    queries: int
    min_recall: float
    exact: Point
    points: list[Point]
    chosen: Point | None  # None: no point reaches min_recall

    @property
    def vector_bytes(self) -> int:
        return self.vectors * self.dimension * 4

    @property
    def own(self) -> Point:
        return next(point for point in self.points if point.own)


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    rows = read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    ids, vectors, model = read_vectors(paths.vectors)
    check_pairs([row["chunk_id"] for row in rows], ids, paths.vectors)
    picks = spread(len(rows), params.index_sweep.vectors)
    sweep = measure(
        [rows[at] for at in picks], vectors[picks], params.index, params.index_sweep, model
    )
    write_output(paths.out, sweep)
    return flat_metrics(sweep)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced."""
    return [at * count // min(count, most) for at in range(min(count, most))]


def measure(
    rows: Sequence[dict[str, Any]],
    vectors: np.ndarray,
    setting: Index,
    grid: IndexSweep,
    model: dict[str, Any],
) -> Sweep:
    """Build and search every graph of the grid, and the one of ``setting``."""
    queries, bounds = make_queries(vectors, grid.queries)
    pairs = [(m, construct) for m in grid.hnsw_m for construct in grid.ef_construct]
    own = (setting.hnsw_m, setting.ef_construct)
    points: list[Point] = []
    exact: Point | None = None
    for m, construct in dict.fromkeys((*pairs, own)):
        knobs = setting.model_copy(
            update={"hnsw_m": m, "ef_construct": construct, "exact_below": 0}
        )
        with tempfile.TemporaryDirectory(prefix="ratchet-sweep-") as folder:
            clock = time.perf_counter()
            manifest = build_index(Path(folder) / "index", rows, vectors, knobs, model)
            seconds = round(time.perf_counter() - clock, 3)
            size = graph_bytes(manifest)
            with open_index(Path(folder) / "index") as index:
                if exact is None:
                    exact = Point(None, None, None, *ask(index, queries, bounds, None), 0, 0.0)
                efs = [*grid.ef, setting.search.ef] if (m, construct) == own else grid.ef
                for ef in dict.fromkeys(efs):
                    mine = (m, construct) == own and ef == setting.search.ef
                    found = ask(index, queries, bounds, ef)
                    points.append(Point(m, construct, ef, *found, size, seconds, mine))
        last = points[-1]
        harness.progress(
            f"m {m}, ef_construct {construct}: built in {seconds:.1f} s, {size / 1e6:.2f} MB; "
            f"recall@{K} {last.recall:.4f}, {last.p50_ms:.2f} ms at ef {last.ef}"
        )
    assert exact is not None  # `own` is always built
    return Sweep(
        len(rows), int(vectors.shape[1]), len(queries), setting.min_recall, exact, points,
        choose(points, setting.min_recall),
    )  # fmt: skip


def make_queries(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries half-way between two chunks, and the cosine that each one's ten nearest reach."""
    import numpy as np

    picks = np.array(spread(len(vectors), count))
    middle = vectors[picks] + vectors[picks[::-1]]
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-9)
    k = min(K, len(vectors))
    return middle, np.partition(middle @ vectors.T, -k, axis=1)[:, -k] - TIE


def ask(
    index: EdgeIndex, queries: np.ndarray, bounds: np.ndarray, ef: int | None
) -> tuple[float, float, float]:
    """recall@10, median and 95th percentile of the latency in ms; ``ef`` None searches exactly."""
    import numpy as np

    search = Search(mode="dense", ef=ef or 1)
    k = min(K, index.count)
    shares, times = [], []
    for query in queries[:5]:
        index.search(query, k, exact=ef is None, search=search)  # pages come in
    for query, bound in zip(queries, bounds, strict=True):
        clock = time.perf_counter()
        hits = index.search(query, k, exact=ef is None, search=search)
        times.append((time.perf_counter() - clock) * 1000)
        shares.append(sum(hit.score >= bound for hit in hits) / k)
    p50, p95 = np.percentile(times, [50, 95])
    return round(float(np.mean(shares)), 6), round(float(p50), 4), round(float(p95), 4)


def graph_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of the HNSW graph's files."""
    return sum(
        file["bytes"] for name, file in manifest["files"].items() if "/vector_index-dense/" in name
    )


def choose(points: Sequence[Point], min_recall: float) -> Point | None:
    """The point that the module's text describes."""
    good = [point for point in points if point.recall >= min_recall]
    if not good:
        return None
    fastest = min(point.p50_ms for point in good)
    near = [point for point in good if point.p50_ms <= fastest * (1 + NOISE)]
    return min(near, key=lambda point: (point.graph_bytes, point.p50_ms))


def flat_metrics(sweep: Sweep) -> dict[str, float]:
    """The point that is set and the point that is chosen, beside exact search."""
    flat = {"vectors": float(sweep.vectors), "exact_p50_ms": sweep.exact.p50_ms}
    for name, point in (("own", sweep.own), ("chosen", sweep.chosen)):
        if point is not None:
            flat |= {
                f"{name}_hnsw_m": float(point.hnsw_m or 0),
                f"{name}_ef_construct": float(point.ef_construct or 0),
                f"{name}_ef": float(point.ef or 0),
                f"{name}_recall_at_{K}": point.recall,
                f"{name}_p50_ms": point.p50_ms,
                f"{name}_graph_mb": round(point.graph_bytes / 1e6, 3),
            }
    return flat


def write_output(out: Path, sweep: Sweep) -> None:
    """Picture, page, and the figures last."""
    from stages.index_sweep_report import page, picture

    harness.fresh_dir(out)
    png = picture(sweep)
    (out / "sweep.png").write_bytes(png)
    (out / "report.html").write_text(page(sweep, png), encoding="utf-8")
    harness.write_json(
        out / "sweep.json", asdict(sweep) | {"vector_bytes": sweep.vector_bytes, "k": K}
    )


if __name__ == "__main__":
    harness.main("index_sweep", run, paths=("chunks", "vectors", "out"))
