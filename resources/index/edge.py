"""An index directory, built and searched by qdrant-edge: Qdrant's engine, in this process.

In: chunks and their vectors. Out: a directory with

    edge_config.json, segments/   qdrant-edge's own files (one shard)
    documents.json                the sorted ids of the documents in it
    manifest.json                 written last: content id, counts, model, recall, file digests

What qdrant-edge 0.9 needs to be told, each measured:

* Its write-ahead log locks out a second process; without it several may read at once.
* Points upserted in one batch are laid out in hash order, which differs in every run. One point an
  operation keeps the order and costs nothing (0.5 s for 10,000). Segments get random names: they
  are renamed; the list of payload indexes is written in hash order: it is sorted. Then two builds
  of the same input are byte-identical, as long as search is exact.
* A scan of float32 vectors is bound by memory: 1.6 ms at 15,000. Above ``quantise_above`` the scan
  reads int8 copies and rescores three times the wanted number from float32: 0.42 ms at the same
  recall of 1.0, for 0.1 s of building. A graph (recall .90 there, 6 s) pays much later.
* Its HNSW graph draws random levels and takes no seed, and where it quantises it writes one too,
  empty: so above ``quantise_above`` chunks the link file differs from build to build (vectors,
  payload and the content id do not).
* The first load after a build changes files: it fills in edge_config.json and removes a journal
  that small shards leave behind. So a build ends with a load; after that no load changed a byte.
* Even then each load writes: it replaces edge_config.json and segment.json by the same bytes, and
  dirties pages of flags and payload. So an index is opened as a private copy
  (:func:`_private_copy`), and its directory is only ever read.
* A filter over a field without a payload index reads every payload: 17 ms at 10,000 points instead
  of 0.6. One index reserves 8 MB of zeros, which DVC hashes and stores: so there is one index, over
  one field that holds all that Filter asks for.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import InputError
from contracts.params import Index
from contracts.records import Chunk, Filter
from resources.index import sparse
from resources.index.filters import FIELDS, clauses
from resources.index.manifest import (
    DOCUMENTS,
    MANIFEST,
    content_id,
    list_files,
    read_manifest,
    recipe,
    write_manifest,
)
from resources.index.search import DENSE, OVERSAMPLING, WORDS, Point, PointIndex

if TYPE_CHECKING:
    import numpy as np


#: exact: every float32 vector is scanned; int8: every int8 copy, the best are rescored.
Kind = Literal["exact", "int8", "graph"]

#: The payload field that is indexed: "source=docs", "doc_id=docs:a.md" …
TAGS = "tags"


class EdgeIndex(PointIndex):
    """A :class:`VectorIndex` over a qdrant-edge directory, opened by :func:`open_index`."""

    def __init__(self, shard: Any, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._shard = shard
        self._filter: tuple[Filter, Any] | None = None  # the last one asked for, translated

    def _nearest(
        self,
        vector: list[float],
        limit: int,
        exact: bool,
        ef: int,
        only: Filter | None,
        payload: bool = False,
    ) -> list[Point]:
        import qdrant_edge as edge

        query = edge.Query.Nearest(vector, using=DENSE)
        again = edge.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
        params = edge.SearchParams(exact=exact, hnsw_ef=ef, quantization=again)
        return self._ask(query, limit, self._translated(only), params, payload)

    def _matching(
        self, indices: list[int], values: list[float], limit: int, only: Filter | None
    ) -> list[Point]:
        import qdrant_edge as edge

        query = edge.Query.Nearest(edge.SparseVector(indices, values), using=WORDS)
        return self._ask(query, limit, self._translated(only), None, False)

    def _fetch(self, ids: list[int], vector: list[float]) -> list[Point]:
        import qdrant_edge as edge

        query = edge.Query.Nearest(vector, using=DENSE)
        these = edge.Filter(must=[edge.HasIdCondition(set(ids))])
        return self._ask(query, len(ids), these, edge.SearchParams(exact=True), True)

    def _ask(self, query: Any, limit: int, only: Any, params: Any, payload: bool) -> list[Point]:
        import qdrant_edge as edge

        request = edge.QueryRequest(
            limit=limit, query=query, filter=only, with_payload=payload, params=params
        )
        found = self._shard.query(request)
        return [
            Point(int(item.id), float(item.score), _row(item.payload) if payload else None)
            for item in found
        ]

    def _translated(self, only: Filter | None) -> Any:
        """The engine's filter. The last is kept: the ids of deleted documents may be many."""
        import qdrant_edge as edge

        if only is None:
            return None
        if self._filter is None or self._filter[0] is not only:
            must, must_not = (
                [
                    edge.FieldCondition(key=key, match=edge.MatchAny(any=values))
                    for key, values in part
                ]
                for part in clauses(only)
            )
            self._filter = only, edge.Filter(must=[*must], must_not=[*must_not])
        return self._filter[1]

    def points(self, step: int = 500) -> Iterator[list[tuple[int, dict[str, Any], dict[str, Any]]]]:
        """Batches of (id, payload, vectors by name), by id: what a server is filled with."""
        for start in range(0, self.count, step):
            ids = list(range(start, min(start + step, self.count)))
            found = self._shard.retrieve(ids, with_payload=True, with_vector=True)
            yield [
                (p.id, _row(p.payload), p.vector) for p in sorted(found, key=lambda item: item.id)
            ]

    def chunks(self) -> Iterator[Chunk]:
        step = 1000
        for start in range(0, self.count, step):
            ids = list(range(start, min(start + step, self.count)))
            points = self._shard.retrieve(ids, with_payload=True, with_vector=False)
            for point in sorted(points, key=lambda item: item.id):
                yield Chunk.model_validate(_row(point.payload))

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> EdgeIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kind_of(count: int, params: Index) -> Kind:
    """How an index of this many chunks is searched."""
    if count > params.exact_below:
        return "graph"
    return "int8" if count > params.quantise_above else "exact"


def _tags(field: str, values: Sequence[str | None]) -> list[str]:
    return [f"{field}={value}" for value in values if value is not None]


def _row(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in payload.items() if key != TAGS}


def build_index(
    path: Path,
    chunks: Sequence[Chunk] | Sequence[Mapping[str, Any]],
    vectors: np.ndarray,
    params: Index,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Build the directory ``path`` (what stood there goes) and return its manifest.

    Args:
        path: where the index goes.
        chunks: chunks, or their fields as read from Parquet (which saves 1 s at 50,000).
        vectors: float32, (len(chunks), dimension), rows of length 1.
        params: graph parameters; up to ``exact_below`` chunks no graph is built, above
            ``quantise_above`` the vectors are kept as int8 too.
        model: ``Embedder.describe()`` of the model that made the vectors.

    The manifest lacks ``recall`` until :func:`certify` adds it.
    """
    if len(chunks) != len(vectors) or not len(chunks):
        raise InputError(
            f"An index needs one vector a chunk; there are {len(chunks)} chunks and "
            f"{len(vectors)} vectors.",
            where=str(path),
            next="run the stages chunks and vectors again",
        )
    rows = [item.model_dump() if isinstance(item, Chunk) else dict(item) for item in chunks]
    order = sorted(range(len(rows)), key=lambda number: rows[number]["chunk_id"])
    rows, vectors = [rows[number] for number in order], vectors[order]
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    kind = kind_of(len(rows), params)
    _write_shard(path, rows, vectors, params, kind)
    found = sorted({row["doc_id"] for row in rows})
    (path / DOCUMENTS).write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", "utf-8")
    made = recipe(params, model, sparse.RECIPE)
    manifest = {
        "format": made["format"],
        "engine": f"qdrant-edge {version('qdrant-edge-py')}",
        "content": content_id(rows, vectors, made),
        "count": len(rows),
        "documents": len(found),
        "dimension": int(vectors.shape[1]),
        "distance": "cosine, as the dot product of unit vectors",
        "kind": kind,
        "exact": kind == "exact",
        "hnsw": {"m": params.hnsw_m, "ef_construct": params.ef_construct}
        if kind == "graph"
        else None,
        "words": sparse.RECIPE,
        "search": params.search.model_dump(mode="json"),
        "model": model,
        "files": list_files(path),
    }
    write_manifest(path, manifest)
    return manifest


def _write_shard(
    path: Path, rows: Sequence[dict[str, Any]], vectors: np.ndarray, params: Index, kind: Kind
) -> None:
    """The engine's files, under names that do not change from build to build."""
    import qdrant_edge as edge

    shard = edge.EdgeShard.create(str(path), _config(int(vectors.shape[1]), params, kind))
    keyword = edge.PayloadSchemaType.Keyword
    shard.update(edge.UpdateOperation.create_field_index(TAGS, keyword))
    for number, (row, vector) in enumerate(zip(rows, vectors, strict=True)):
        words = edge.SparseVector(*sparse.of_document(row))
        tags = [tag for field in FIELDS.values() for tag in _tags(field, [row[field]])]
        point = edge.Point(number, {DENSE: vector.tolist(), WORDS: words}, {**row, TAGS: tags})
        shard.update(edge.UpdateOperation.upsert_points([point]))
    shard.optimize()
    shard.flush()
    shard.close()
    edge.EdgeShard.load(str(path)).close()
    for listed in path.rglob("payload_index/config.json"):
        text = json.dumps(json.loads(listed.read_text("utf-8")), sort_keys=True)
        listed.write_text(text, encoding="utf-8")
    segments = sorted(
        (path / "segments").iterdir(),
        key=lambda folder: (-(folder / f"vector_index-{DENSE}").exists(), folder.name),
    )
    for number, folder in enumerate(segments):
        folder.rename(folder.with_name(f"00000000-0000-4000-8000-{number:012d}"))


def _config(dimension: int, params: Index, kind: Kind) -> Any:
    import qdrant_edge as edge

    never = 10**9  # KB of vectors; no shard gets there
    return edge.EdgeConfig(
        vectors={DENSE: edge.EdgeVectorParams(size=dimension, distance=edge.Distance.Dot)},
        sparse_vectors={WORDS: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
        hnsw_config=edge.HnswIndexConfig(
            m=params.hnsw_m if kind == "graph" else 0,
            ef_construct=params.ef_construct,
            full_scan_threshold=10,  # KB; its smallest: whoever asks for the graph gets it
            max_indexing_threads=1,
        ),
        quantization_config=edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8)
        if kind == "int8"
        else None,
        optimizers=edge.EdgeOptimizersConfig(
            default_segment_number=1, indexing_threshold=never if kind == "exact" else 1
        ),
        max_search_threads=1,
        wal_enabled=False,
    )


def open_index(path: Path) -> EdgeIndex:
    """Open an index directory for reading; any number of processes may. Raises InputError."""
    import qdrant_edge as edge

    manifest = read_manifest(path)
    view = _private_copy(path)
    try:
        return EdgeIndex(edge.EdgeShard.load(str(view)), manifest)
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


def _private_copy(path: Path) -> Path:
    """A copy of the directory for the engine to write in; the manifest stays behind.

    Linking instead was tried: the engine counts its data files by directory entry and does not see
    links, and a linked folder is written through to DVC's cache. The copy leaves holes where the
    engine only reserved space: 8 MB for 70 at 3,500 chunks, 0.1 s; a reader of 100,000 chunks would
    copy about 250 MB.
    """
    copy = Path(tempfile.mkdtemp(prefix="ratchet-index-"))
    for folder, _, names in os.walk(path):
        here = copy / Path(folder).relative_to(path)
        here.mkdir(exist_ok=True)
        for name in names:
            if name not in (MANIFEST, DOCUMENTS):
                copy_sparse(Path(folder) / name, here / name)
    return copy


def copy_sparse(source: Path, target: Path, durable: bool = False) -> None:
    """Copy a file; holes and blocks of zeros become holes. ``durable``: on the disk on return."""
    block = 1 << 16
    zeros = bytes(block)
    with source.open("rb") as reader, target.open("wb") as writer:
        length = os.fstat(reader.fileno()).st_size
        at = _data_from(reader.fileno(), 0, length)
        while at < length:
            hole = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            while at < hole:
                data = os.pread(reader.fileno(), min(block, hole - at), at)
                if not data:
                    break
                if data != zeros:
                    os.pwrite(writer.fileno(), data, at)
                at += len(data)
            at = _data_from(reader.fileno(), at, length)
        writer.truncate(length)
        if durable:
            os.fsync(writer.fileno())


def _data_from(file: int, at: int, length: int) -> int:
    """Where the next bytes that are no hole begin; ``length`` when there are none."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return length
        raise
