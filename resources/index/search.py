"""What an index answers, whatever engine holds it: the interface, ranks, ties and fusion.

An engine gives three things: the nearest points by vector, the best by words, and the payload and
cosine similarity of given points. What is made of them is here, once, so that two engines cannot
disagree: ties are broken by chunk id, and reciprocal rank fusion (Cormack, Clarke and Büttcher,
SIGIR 2009) is the paper's, ``sum of weight / (k + rank)`` with ranks from 1. Qdrant's own counts
from 0, puts the weight into the rank, and breaks ties of BM25 as its segments happen to lie.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

from contracts.errors import ConfigError
from contracts.params import Search
from contracts.records import Chunk, Filter
from resources.index import sparse

if TYPE_CHECKING:
    import numpy as np

#: Asked for beyond the limit, so that among equals the smallest chunk id wins, not the engine's
#: choice. Texts that stand in more than this many chunks are cut as the engine likes.
TIES = 16

#: Candidates of an int8 scan for each result, rescored from float32.
OVERSAMPLING = 3.0

DENSE, WORDS = "dense", "words"  # names of the two vectors of a point


@dataclass(frozen=True)
class Hit:
    """A chunk, its cosine similarity to the query (-1 to 1), and what it was ranked by.

    ``rank_score`` is the cosine too for dense search, the BM25 score for sparse, and the sum of
    weighted reciprocal ranks for fused.
    """

    chunk: Chunk
    score: float
    rank_score: float


@dataclass(frozen=True)
class Point:
    """A point as an engine gives it. Ids ascend as chunk ids do."""

    id: int
    score: float
    payload: dict[str, Any] | None = None


@dataclass(frozen=True)
class Lookup:
    """What an engine is asked for: the best points by vector (cosine) or by words (BM25)."""

    limit: int
    vector: list[float] = field(default_factory=list)
    words: tuple[list[int], list[float]] | None = None  # token hashes and weights
    only: Filter | None = None
    exact: bool = True  # every float32 vector is scanned
    ef: int | None = None  # of a graph
    ids: Sequence[int] | None = None  # those points and no others; ``only`` does not count
    payload: bool = False  # whether it comes along


class Asked(TypedDict, total=False):
    """How to search; what is missing or None is as the index was built and published."""

    #: True scans every float32 vector, False lets the engine use its graph or int8 copies.
    exact: bool | None
    text: str | None  # the question, for sparse and fused search
    search: Search | None  # mode and weights; params.yaml: index.search
    only: Filter | None  # which chunks may come back; the engine looks at no others


class VectorIndex(Protocol):
    """What retrieval needs of an engine."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What the index holds and how it was made: ``content``, ``model``, ``recall`` …"""

    @property
    def count(self) -> int:
        """Chunks in the index."""

    def search(self, vector: np.ndarray, k: int, **asked: Unpack[Asked]) -> list[Hit]:
        """The ``k`` best chunks, best first; ties by chunk id.

        Args:
            vector: float32, (dimension,), length 1.
            k: at least 1; fewer come back from a smaller index.
            asked: what else is asked for, see :class:`Asked`.

        Raises:
            ConfigError: sparse or fused search without ``text``.
        """

    def chunks(self, documents: Collection[str] | None = None) -> Iterator[Chunk]:
        """Every chunk, by chunk id; with ``documents`` those of these doc_ids alone."""

    def close(self) -> None:
        """Give the files back. Searching afterwards is an error."""


class PointIndex(ABC):
    """A :class:`VectorIndex` over whatever finds points."""

    manifest: dict[str, Any]

    @property
    def count(self) -> int:
        return int(self.manifest["count"])

    def search(self, vector: np.ndarray, k: int, **asked: Unpack[Asked]) -> list[Hit]:
        how = asked.get("search") or Search.model_validate(self.manifest["search"])
        text, only, exact = asked.get("text"), asked.get("only"), asked.get("exact")
        exact = self.manifest["exact"] if exact is None else exact
        near = Lookup(k + TIES, [float(v) for v in vector], only=only, exact=exact, ef=how.ef)
        if how.mode == "dense":
            found = self._best(replace(near, payload=True), k)
            return [_hit(point, point, point.score) for point in found]
        if text is None:
            raise ConfigError(
                f"A {how.mode} search needs the question's text, not only its vector.",
                where="params.yaml: index.search.mode",
                next="give search() the argument text, or set the mode to dense",
            )
        words = Lookup(k + TIES, words=sparse.of_query(text), only=only)
        if how.mode == "sparse":
            ranked = self._best(words, k)
        else:
            depth = max(how.depth, k)
            lists = [self._best(replace(one, limit=depth + TIES), depth) for one in (near, words)]
            ranked = fuse(lists, how.weights, how.rrf_k)[:k]
        if not ranked:
            return []
        ids = [point.id for point in ranked]
        these = Lookup(len(ids), near.vector, ids=ids, payload=True)
        known = {point.id: point for point in self._find(these)}
        return [_hit(point, known[point.id], known[point.id].score) for point in ranked]

    def _best(self, lookup: Lookup, k: int) -> list[Point]:
        """The ``k`` best, best first, ties by id; none for a question of stop words."""
        if lookup.words is not None and not lookup.words[0]:
            return []
        return ordered(self._find(lookup))[:k]

    @abstractmethod
    def _find(self, lookup: Lookup) -> list[Point]:
        """What the engine finds, in any order."""

    @abstractmethod
    def chunks(self, documents: Collection[str] | None = None) -> Iterator[Chunk]: ...

    @abstractmethod
    def close(self) -> None: ...


def ordered(points: Sequence[Point]) -> list[Point]:
    """Best first; among equals the smallest id, which is the smallest chunk id."""
    return sorted(points, key=lambda point: (-point.score, point.id))


def fuse(lists: Sequence[Sequence[Point]], weights: Sequence[float], k: int) -> list[Point]:
    """Weighted reciprocal rank fusion of ranked lists; the score is the sum."""
    sums: dict[int, float] = {}
    for points, weight in zip(lists, weights, strict=True):
        for rank, point in enumerate(points, start=1):
            sums[point.id] = sums.get(point.id, 0.0) + weight / (k + rank)
    return ordered([Point(id, score) for id, score in sums.items()])


def _hit(ranked: Point, known: Point, score: float) -> Hit:
    return Hit(Chunk.model_validate(known.payload), score, ranked.score)
