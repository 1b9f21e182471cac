"""What an index answers, whatever engine holds it: the interface, ranks, ties and fusion.

An engine gives three things: the nearest points by vector, the best by words, and the payload and
cosine similarity of given points. What is made of them is here, once, so that two engines cannot
disagree: ties are broken by chunk id, and reciprocal rank fusion (Cormack, Clarke and Büttcher,
SIGIR 2009) is the paper's, ``sum of weight / (k + rank)`` with ranks from 1. Qdrant's own counts
from 0, puts the weight into the rank, and breaks ties of BM25 as its segments happen to lie.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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


class VectorIndex(Protocol):
    """What retrieval needs of an engine."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What the index holds and how it was made: ``content``, ``model``, ``recall`` …"""

    @property
    def count(self) -> int:
        """Chunks in the index."""

    def search(
        self,
        vector: np.ndarray,
        k: int,
        exact: bool | None = None,
        *,
        text: str | None = None,
        search: Search | None = None,
        only: Filter | None = None,
    ) -> list[Hit]:
        """The ``k`` best chunks, best first; ties by chunk id.

        Args:
            vector: float32, (dimension,), length 1.
            k: at least 1; fewer come back from a smaller index.
            exact: True scans every float32 vector, False lets the engine use what it has (graph or
                int8 copies), None does what the index was built for.
            text: the question, for sparse and fused search.
            search: mode and weights; None is what the index was published with
                (params.yaml: index.search).
            only: which chunks may come back; the engine looks at no others.

        Raises:
            ConfigError: sparse or fused search without ``text``.
        """

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk, by chunk id."""

    def close(self) -> None:
        """Give the files back. Searching afterwards is an error."""


class PointIndex(ABC):
    """A :class:`VectorIndex` over whatever finds points."""

    manifest: dict[str, Any]

    @property
    def count(self) -> int:
        return int(self.manifest["count"])

    def search(
        self,
        vector: np.ndarray,
        k: int,
        exact: bool | None = None,
        *,
        text: str | None = None,
        search: Search | None = None,
        only: Filter | None = None,
    ) -> list[Hit]:
        how = search or Search.model_validate(self.manifest["search"])
        exact = self.manifest["exact"] if exact is None else exact
        values = [float(value) for value in vector]
        if how.mode == "dense":
            near = self._nearest(values, k + TIES, exact, how.ef, only, payload=True)
            return [_hit(point, point, point.score) for point in ordered(near)[:k]]
        if text is None:
            raise ConfigError(
                f"A {how.mode} search needs the question's text, not only its vector.",
                where="params.yaml: index.search.mode",
                next="give search() the argument text, or set the mode to dense",
            )
        words = sparse.of_query(text)
        if how.mode == "sparse":
            ranked = ordered(self._matching(*words, k + TIES, only))[:k] if words[0] else []
        else:
            depth = max(how.depth, k)
            lists = [ordered(self._nearest(values, depth + TIES, exact, how.ef, only))[:depth]]
            found = self._matching(*words, depth + TIES, only) if words[0] else []
            lists.append(ordered(found)[:depth])
            ranked = fuse(lists, how.weights, how.rrf_k)[:k]
        if not ranked:
            return []
        known = {point.id: point for point in self._fetch([p.id for p in ranked], values)}
        return [_hit(point, known[point.id], known[point.id].score) for point in ranked]

    @abstractmethod
    def _nearest(
        self,
        vector: list[float],
        limit: int,
        exact: bool,
        ef: int,
        only: Filter | None,
        payload: bool = False,
    ) -> list[Point]:
        """The most alike points, scored by cosine similarity."""

    @abstractmethod
    def _matching(
        self, indices: list[int], values: list[float], limit: int, only: Filter | None
    ) -> list[Point]:
        """The points that share words with the query, scored by BM25."""

    @abstractmethod
    def _fetch(self, ids: list[int], vector: list[float]) -> list[Point]:
        """Those points with payload, scored by cosine similarity, in any order."""

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]: ...

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
