"""An index directory, searched by qdrant-edge: Qdrant's engine, in this process.

In: a directory that ``resources.index.build`` wrote. Out: an opened index. The directory holds

    edge_config.json, segments/   qdrant-edge's own files (one shard)
    order.bin                     the engine's ids by chunk id, where they are not 0, 1, 2 …
    documents.json                the sorted ids of the documents in it
    manifest.json                 written last: content id, counts, model, recall, file digests

Each load by the engine writes: it replaces edge_config.json and segment.json by the same bytes, and
dirties pages of flags and payload. So an index is opened as a private copy (:func:`_private_copy`),
and its directory is only ever read.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.records import Chunk, Filter
from resources.index.build import TAGS, tags
from resources.index.files import copy_tree
from resources.index.filters import clauses
from resources.index.manifest import DOCUMENTS, MANIFEST, ORDER, read_manifest
from resources.index.search import DENSE, OVERSAMPLING, WORDS, Lookup, Point, PointIndex


class EdgeIndex(PointIndex):
    """A :class:`VectorIndex` over a qdrant-edge directory, opened by :func:`open_index`."""

    def __init__(self, shard: Any, manifest: dict[str, Any], order: Sequence[int]) -> None:
        self.manifest = manifest
        self._shard = shard
        self._order = order  # the engine's ids, by ours; a range where they are the same
        self._ours = (
            order
            if isinstance(order, range)
            else {theirs: ours for ours, theirs in enumerate(order)}
        )
        self._filter: tuple[Filter, Any] | None = None  # the last one asked for, translated

    def _find(self, lookup: Lookup) -> list[Point]:
        import qdrant_edge as edge

        if lookup.words is not None:
            query = edge.Query.Nearest(edge.SparseVector(*lookup.words), using=WORDS)
            params = None
        else:
            query = edge.Query.Nearest(lookup.vector, using=DENSE)
            again = edge.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
            params = edge.SearchParams(exact=lookup.exact, hnsw_ef=lookup.ef, quantization=again)
        if lookup.ids is None:
            only = self._translated(lookup.only)
        else:
            these: set[Any] = {self._order[id] for id in lookup.ids}
            only = edge.Filter(must=[edge.HasIdCondition(these)])
        request = edge.QueryRequest(
            limit=lookup.limit,
            query=query,
            filter=only,
            with_payload=lookup.payload,
            params=params,
        )
        return [
            Point(
                self._ours[item.id],
                float(item.score),
                _row(item.payload) if lookup.payload else None,
            )
            for item in self._shard.query(request)
        ]

    def _translated(self, only: Filter | None) -> Any:
        """The engine's filter. The last is kept: the ids of deleted documents may be many."""
        import qdrant_edge as edge

        if only is None:
            return None
        if self._filter is None or self._filter[0] is not only:
            must, must_not = (
                [
                    edge.FieldCondition(key=TAGS, match=edge.MatchAny(any=tags(*clause)))
                    for clause in part
                ]
                for part in clauses(only)
            )
            self._filter = only, edge.Filter(must=[*must], must_not=[*must_not])
        return self._filter[1]

    def points(self, step: int = 500) -> Iterator[list[tuple[int, dict[str, Any], dict[str, Any]]]]:
        """Batches of (id, payload, vectors by name), by id: what a server is filled with."""
        for batch in self._batches(step, with_vector=True):
            yield [(id, _row(point.payload), point.vector) for id, point in batch]

    def chunks(self, documents: Collection[str] | None = None) -> Iterator[Chunk]:
        batches = self._batches(1000) if documents is None else [self._of(documents)]
        for batch in batches:
            for _, point in batch:
                yield Chunk.model_validate(_row(point.payload))

    def _of(self, documents: Collection[str]) -> list[tuple[int, Any]]:
        import qdrant_edge as edge

        theirs = edge.MatchAny(any=tags("doc_id", sorted(documents)))
        only = edge.Filter(must=[edge.FieldCondition(key=TAGS, match=theirs)])
        request = edge.ScrollRequest(
            limit=self.count, filter=only, with_payload=True, with_vector=False
        )
        return self._by_id(self._shard.scroll(request)[0])

    def _batches(self, step: int, with_vector: bool = False) -> Iterator[list[tuple[int, Any]]]:
        """The engine's points with their ids, by id."""
        for start in range(0, self.count, step):
            ids = list(self._order[start : start + step])
            yield self._by_id(self._shard.retrieve(ids, with_payload=True, with_vector=with_vector))

    def _by_id(self, found: Iterable[Any]) -> list[tuple[int, Any]]:
        pairs = ((self._ours[point.id], point) for point in found)
        return sorted(pairs, key=lambda pair: pair[0])

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> EdgeIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _row(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in payload.items() if key != TAGS}


def open_index(path: Path) -> EdgeIndex:
    """Open an index directory for reading; any number of processes may. Raises InputError."""
    import qdrant_edge as edge

    manifest = read_manifest(path)
    order = _order(path, manifest)
    view = _private_copy(path)
    try:
        return EdgeIndex(edge.EdgeShard.load(str(view)), manifest, order)
    except Exception as error:  # the engine raises bare Exception
        raise InputError(
            f"qdrant-edge cannot load this index: {error}",
            where=str(path),
            next="build it again: dvc repro index",
        ) from None
    finally:
        # The engine has mapped every file: the names may go, so that not even a killed reader
        # leaves anything behind.
        shutil.rmtree(view, ignore_errors=True)


def _order(path: Path, manifest: dict[str, Any]) -> Sequence[int]:
    """The engine's ids by chunk id."""
    if ORDER not in manifest["files"]:
        return range(manifest["count"])
    return array("I", (path / ORDER).read_bytes())


def _private_copy(path: Path) -> Path:
    """A copy of the directory for the engine to write in; what is ours stays behind."""
    copy = Path(tempfile.mkdtemp(prefix="ratchet-index-"))
    copy_tree(path, copy, without=(MANIFEST, DOCUMENTS, ORDER))
    return copy
