"""The sweep: real graphs over real vectors, a choice that survives noise, one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from contracts.errors import InputError
from contracts.records import Chunk
from stages import index_sweep
from stages.index_sweep import Point, choose, spread
from stages.tables import write_table
from stages.vectors import write_vectors
from tests.stages.knowledge import params, paths

COUNT, DIMENSION = 600, 24
MODEL = {"name": "none", "dtype": "float32", "digest": "0" * 64, "dimension": DIMENSION}
GRID = {"vectors": 500, "queries": 30, "hnsw_m": [4], "ef_construct": [8], "ef": [1, 200]}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Vectors without any structure: the hardest for a graph."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(COUNT, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        Chunk(
            chunk_id=f"docs:{n:04d}.md#0-4", doc_id=f"docs:{n:04d}.md", source="docs",
            path=f"{n:04d}.md", title="T", heading="", start=0, end=4, tokens=1, text_sha=str(n),
            text=f"text {n}",
        ).model_dump()
        for n in range(COUNT)
    ]  # fmt: skip
    chunks = pa.Table.from_pylist(rows)
    write_table(tmp_path / "chunks.parquet", chunks)
    write_vectors(tmp_path / "vectors.parquet", chunks, vectors, MODEL)
    return {
        "chunks": tmp_path / "chunks.parquet",
        "vectors": tmp_path / "vectors.parquet",
        "out": tmp_path / "sweep",
    }


def test_recall_rises_with_ef_and_the_set_graph_is_among_the_points(
    inputs: dict[str, Path],
) -> None:
    search = params().index.search.model_copy(update={"ef": 64})
    knobs = params(index_sweep=GRID, index={"hnsw_m": 16, "ef_construct": 100, "search": search})
    metrics = index_sweep.run(paths(**inputs), knobs)
    found = json.loads((inputs["out"] / "sweep.json").read_text())
    shapes = [(p["hnsw_m"], p["ef_construct"], p["ef"]) for p in found["points"]]
    assert shapes == [(4, 8, 1), (4, 8, 200), (16, 100, 1), (16, 100, 200), (16, 100, 64)]
    low, high, *_ = (point["recall"] for point in found["points"])
    assert low < high <= 1 and found["exact"]["recall"] == 1.0
    assert found["points"][0]["graph_bytes"] < found["points"][2]["graph_bytes"]
    assert found["vectors"] == metrics["vectors"] == 500 and found["vector_bytes"] == 500 * 24 * 4
    assert [point["own"] for point in found["points"]] == [False] * 4 + [True]
    assert metrics["own_ef"] == 64 and metrics["own_recall_at_10"] == found["points"][4]["recall"]
    assert 0 < metrics["exact_p50_ms"] <= found["exact"]["p95_ms"]
    out = inputs["out"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "finds" in (out / "report.html").read_text()


def test_a_floor_that_no_graph_reaches_is_said(inputs: dict[str, Path]) -> None:
    grid = GRID | {"ef": [1], "queries": 10, "vectors": 200}
    metrics = index_sweep.run(paths(**inputs), params(index_sweep=grid, index={"min_recall": 1.01}))
    assert not any(name.startswith("chosen") for name in metrics)
    assert "No point reaches the floor" in (inputs["out"] / "report.html").read_text()


def test_vectors_of_other_chunks_are_refused(inputs: dict[str, Path]) -> None:
    chunks = pa.parquet.read_table(inputs["chunks"])
    write_table(inputs["chunks"], chunks.slice(0, 10))
    with pytest.raises(InputError, match="do not belong together"):
        index_sweep.run(paths(**inputs), params(index_sweep=GRID))


def point(recall: float, p50: float, size: int, **changes: Any) -> Point:
    return Point(8, 16, 32, recall, p50, p50 * 2, size, 1.0, **changes)


def test_the_chosen_point_is_the_smallest_graph_among_the_fast_ones() -> None:
    fast, smaller = point(0.99, 1.00, 900), point(0.985, 1.05, 500)
    smallest_but_slow, fastest_but_wrong = point(0.99, 1.2, 100), point(0.97, 0.2, 100)
    points = [fast, smaller, smallest_but_slow, fastest_but_wrong]
    assert choose(points, 0.98) is smaller
    assert choose(points[:1] + points[2:], 0.98) is fast
    assert choose(points, 0.999) is None


def test_places_are_spread_evenly() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 5) == [0, 1, 2]
    assert len(set(spread(1001, 1000))) == 1000
