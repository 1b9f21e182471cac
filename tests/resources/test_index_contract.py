"""What a search owes, whatever engine answers: the same tests over both.

The server's adapter talks to qdrant-client's local mode; to a real server as well where
RATCHET_TEST_QDRANT_URL names one (conftest hides QDRANT_URL from tests).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracts.errors import ConfigError
from contracts.params import Search
from contracts.records import Chunk, Filter
from resources.index import VectorIndex, build_index, hide, open_index, server
from resources.index.search import Point, fuse
from resources.index.sparse import of_query
from tests.resources.indexes import MODEL, PARAMS, chunk, vectors_of

URL = os.environ.get("RATCHET_TEST_QDRANT_URL")
ENGINES = ["edge", "local", *(["server"] if URL else [])]
WORDS = ["gate", "rollback", "release", "index", "bread", "schedule", "sensor", "partition"]


def _chunks() -> list[Chunk]:
    found = [
        chunk(f"docs:{n // 4:02}.md", n % 4 * 100, f"{WORDS[n % 8]} {WORDS[n * 3 % 8]} number{n}",
              format="markdown", language="en")
        for n in range(60)
    ]  # fmt: skip
    found += [
        chunk(f"code:{n:02}.py", 0, f"def {WORDS[n % 8]}(): return number{n}", format="code",
              language="python", licence="MIT")
        for n in range(20)
    ]  # fmt: skip
    # The same text in 12 documents: ties in every mode.
    return found + [chunk(f"twin:{n:02}.md", 0, "identical twins of a gate") for n in range(12)]


CHUNKS = _chunks()
VECTORS = vectors_of(CHUNKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contract") / "index"
    build_index(path, CHUNKS, VECTORS, PARAMS, MODEL)
    return path


@pytest.fixture(scope="module", params=ENGINES)
def index(request: pytest.FixtureRequest, folder: Path) -> Iterator[VectorIndex]:
    if request.param == "edge":
        with open_index(folder) as opened:
            yield opened
        return
    from qdrant_client import QdrantClient

    client = QdrantClient(url=URL) if request.param == "server" else QdrantClient(":memory:")
    with open_index(folder) as opened:
        name = server.upload(client, opened)
    yield server.ServerIndex(client, name)
    client.delete_collection(name)


def ids(hits: Any) -> list[str]:
    return [hit.chunk.chunk_id for hit in hits]


def nearest(vector: np.ndarray, k: int, keep: Callable[[Chunk], bool]) -> list[tuple[str, float]]:
    """numpy's answer: cosine descending, then chunk id."""
    scored = [
        (-float(row @ vector), item.chunk_id)
        for item, row in zip(CHUNKS, VECTORS, strict=True)
        if keep(item)
    ]
    # Two sums of the same numbers in another order differ in the last bits: those are ties.
    scored.sort(key=lambda pair: (round(pair[0], 5), pair[1]))
    return [(name, -score) for score, name in scored[:k]]


def bm25(text: str, k: int) -> list[tuple[str, float]]:
    """BM25 by its definition, over the tokens that the package finds."""
    from resources.index import sparse

    tokens = [dict(zip(*sparse.of_document(item.model_dump()), strict=True)) for item in CHUNKS]
    asked = of_query(text)[0]
    n = len(CHUNKS)
    df = {token: sum(token in found for found in tokens) for token in asked}
    idf = {token: math.log((n - df[token] + 0.5) / (df[token] + 0.5) + 1) for token in asked}
    scored = [
        (-sum(found.get(token, 0) * idf[token] for token in asked), item.chunk_id)
        for item, found in zip(CHUNKS, tokens, strict=True)
    ]
    scored = sorted(
        (pair for pair in scored if pair[0] < 0), key=lambda pair: (round(pair[0], 4), pair[1])
    )
    return [(name, -score) for score, name in scored[:k]]


def test_dense_search_is_numpys(index: VectorIndex) -> None:
    for number in (0, 33, 79, 85):
        hits = index.search(VECTORS[number], 9)
        expected = nearest(VECTORS[number], 9, lambda _: True)
        assert ids(hits) == [name for name, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([s for _, s in expected], abs=1e-5)
        assert [hit.rank_score for hit in hits] == [hit.score for hit in hits]


def test_sparse_search_is_bm25(index: VectorIndex) -> None:
    text = "Where is the rollback of a release, number13?"
    hits = index.search(VECTORS[5], 7, text=text, search=Search(mode="sparse"))
    expected = bm25(text, 7)
    assert ids(hits) == [name for name, _ in expected]
    assert [hit.rank_score for hit in hits] == pytest.approx([s for _, s in expected], abs=1e-4)
    rows = {item.chunk_id: row for item, row in zip(CHUNKS, VECTORS, strict=True)}
    for hit in hits:  # the score stays the cosine
        assert hit.score == pytest.approx(float(rows[hit.chunk.chunk_id] @ VECTORS[5]), abs=1e-5)


def test_fused_search_is_weighted_reciprocal_ranks(index: VectorIndex) -> None:
    text, vector = "a sensor and a schedule", VECTORS[61]
    how = Search(mode="fused", rrf_k=60, weights=(2.0, 1.0), depth=20)
    sums: dict[str, float] = {}
    lists = (nearest(vector, 20, lambda _: True), bm25(text, 20))
    for found, weight in zip(lists, how.weights, strict=True):
        for rank, (name, _) in enumerate(found, start=1):
            sums[name] = sums.get(name, 0) + weight / (60 + rank)
    expected = sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
    hits = index.search(vector, 10, text=text, search=how)
    assert ids(hits) == [name for name, _ in expected]
    assert [hit.rank_score for hit in hits] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize("mode", ["dense", "sparse", "fused"])
def test_ties_are_broken_by_chunk_id(index: VectorIndex, mode: Any) -> None:
    hits = index.search(VECTORS[-1], 5, text="identical twins", search=Search(mode=mode))
    assert ids(hits) == [f"twin:{n:02}.md#0-25" for n in range(5)]


@pytest.mark.parametrize("mode", ["dense", "sparse", "fused"])
@pytest.mark.parametrize(
    ("only", "keep"),
    [
        (Filter(sources=["code"]), lambda c: c.source == "code"),
        (Filter(sources=["code", "twin"]), lambda c: c.source in ("code", "twin")),
        (Filter(paths=["03.md"], sources=["docs"]), lambda c: c.doc_id == "docs:03.md"),
        (Filter(formats=["markdown"]), lambda c: c.format == "markdown"),
        (Filter(languages=["python"]), lambda c: c.language == "python"),
        (Filter(licences=["MIT"]), lambda c: c.licence == "MIT"),
        (hide(Filter(sources=["docs"]), {"docs:00.md", "no:such"}),
         lambda c: c.source == "docs" and c.doc_id != "docs:00.md"),
        (Filter(sources=["nowhere"]), lambda c: False),
    ],
)  # fmt: skip
def test_filters_hold_in_every_mode(index: VectorIndex, mode: Any, only: Filter, keep: Any) -> None:
    vector, text = VECTORS[2], " ".join(WORDS)
    hits = index.search(vector, 50, text=text, search=Search(mode=mode), only=only)
    assert all(keep(hit.chunk) for hit in hits)
    if mode == "dense":  # nothing that may come is lost
        assert ids(hits) == [name for name, _ in nearest(vector, 50, keep)]
    else:
        assert bool(hits) == any(keep(item) for item in CHUNKS)


def test_words_without_meaning_find_nothing_or_fall_back(index: VectorIndex) -> None:
    vector = VECTORS[7]
    assert index.search(vector, 3, text="the of and", search=Search(mode="sparse")) == []
    fused = index.search(vector, 3, text="the of and", search=Search(mode="fused"))
    assert ids(fused) == ids(index.search(vector, 3))


def test_words_need_the_text(index: VectorIndex) -> None:
    for mode in ("sparse", "fused"):
        with pytest.raises(ConfigError, match="question's text"):
            index.search(VECTORS[0], 3, search=Search(mode=mode))


def test_everything_is_there_once(index: VectorIndex) -> None:
    assert index.count == len(CHUNKS)
    assert list(index.chunks()) == sorted(CHUNKS, key=lambda item: item.chunk_id)
    assert len(index.search(VECTORS[0], 1000)) == len(CHUNKS)


def test_chunks_of_some_documents(index: VectorIndex) -> None:
    few = ["docs:03.md", "code:11.py", "docs:nowhere.md"]
    wanted = sorted((c for c in CHUNKS if c.doc_id in few), key=lambda item: item.chunk_id)
    assert len(wanted) == 5 and list(index.chunks(few)) == wanted
    assert list(index.chunks([])) == []


def test_the_default_is_the_indexs_own(tmp_path: Path) -> None:
    how = Search(mode="sparse")
    params = PARAMS.model_copy(update={"search": how})
    manifest = build_index(tmp_path / "index", CHUNKS, VECTORS, params, MODEL)
    assert manifest["search"]["mode"] == "sparse"
    with open_index(tmp_path / "index") as opened:
        assert opened.search(VECTORS[0], 4, text="bread") == opened.search(
            VECTORS[0], 4, text="bread", search=how
        )


def test_fusion_weighs_ranks_from_one() -> None:
    first, second = [Point(1, 9.0), Point(2, 8.0)], [Point(2, 5.0)]
    assert fuse([first, second], (1.0, 1.0), 60) == [
        Point(2, 1 / 62 + 1 / 61),
        Point(1, 1 / 61),
    ]
