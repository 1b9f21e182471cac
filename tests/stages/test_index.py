"""The stage index: built from real chunks, certified, and refused when it misses neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from contracts.digests import dir_md5
from contracts.errors import InputError, QualityError
from contracts.params import Search
from contracts.settings import Settings
from resources.index import build_index, open_index
from stages import index, vectors
from stages.tables import write_table
from tests.stages.knowledge import params, paths, write_chunks


@pytest.fixture
def inputs(settings: Settings, tmp_path: Path) -> dict[str, Path]:
    chunks = write_chunks(tmp_path)
    given = {"chunks": chunks, "vectors": tmp_path / "vectors.parquet", "out": tmp_path / "index"}
    vectors.run(paths(chunks=chunks, out=given["vectors"]), params())
    return given


def test_the_index_is_certified_and_repeats(inputs: dict[str, Path]) -> None:
    metrics = index.run(paths(**inputs), params())
    assert metrics == {"chunks": 6, "recall_at_10": 1.0, "worst_probe": 1.0}
    first = dir_md5(inputs["out"])
    with open_index(inputs["out"]) as opened:
        assert opened.manifest["recall"] == {"recall_at_10": 1.0, "worst_probe": 1.0}
        assert opened.manifest["model"]["name"] == "all-MiniLM-L6-v2"
        ids, values, _ = vectors.read_vectors(inputs["vectors"])
        (hit,) = opened.search(values[4], 1, search=Search())
        assert hit.chunk.chunk_id == ids[4]
    index.run(paths(**inputs), params())
    assert dir_md5(inputs["out"]) == first


def test_a_graph_that_misses_neighbours_is_refused(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "measure_recall", lambda *_: (0.5, 0.1))
    with pytest.raises(QualityError, match=r"finds 0\.5000 .* 0\.98 is the least"):
        index.run(paths(**inputs), params())


def test_an_updated_index_that_misses_neighbours_is_built_from_nothing(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = params()
    given = given.model_copy(update={"index": given.index.model_copy(update={"quantise_above": 1})})
    index.run(paths(**inputs), given)
    measure, kept = index.measure_recall, list[bool]()

    def aged(*values: Any) -> tuple[float, float]:
        return (0.5, 0.1) if len(kept) == 1 else measure(*values)

    def build(*values: Any) -> Any:
        manifest = build_index(*values)
        kept.append(values[-1].reused)
        return manifest

    monkeypatch.setattr(index, "measure_recall", aged)
    monkeypatch.setattr(index, "build_index", build)
    assert index.run(paths(**inputs), given)["recall_at_10"] == 1.0
    assert kept == [True, False]


class Deaf:
    """An index that always answers with the same chunks."""

    def __init__(self, similar: Any) -> None:
        self.similar = similar

    def search(self, vector: Any, k: int, **_: Any) -> list[Any]:
        from types import SimpleNamespace

        return [SimpleNamespace(score=float(self.similar[n] @ vector)) for n in range(k)]


def test_recall_sees_a_bad_index() -> None:
    draw = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    recall, least = index.measure_recall(Deaf(draw), draw, params().index)  # type: ignore[arg-type]
    assert recall < 0.1 and least == 0.0


def test_chunks_and_vectors_of_different_runs_are_refused(inputs: dict[str, Path]) -> None:
    table = pq.read_table(inputs["vectors"])
    write_table(inputs["vectors"], table.slice(1))
    with pytest.raises(InputError, match="1 ids stand in only one") as caught:
        index.run(paths(**inputs), params())
    assert caught.value.offenders == [table["chunk_id"][0].as_py()]
    write_table(inputs["vectors"], table.take(list(range(len(table)))[::-1]))
    with pytest.raises(InputError, match="order differs"):
        index.run(paths(**inputs), params())
