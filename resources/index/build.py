"""Building an index directory with qdrant-edge: from nothing, or from what an earlier build left.

In: chunks and their vectors. Out: the directory that ``resources.index.edge`` describes and opens.

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
* A filter over a field without a payload index reads every payload: 17 ms at 10,000 points instead
  of 0.6. One index reserves 8 MB of zeros, which DVC hashes and stores: so there is one index, over
  one field that holds all that Filter asks for.
* Three quarters of a build are spent on handing points over from Python; laying out a segment of
  20,000 takes 0.5 s. So above ``quantise_above``, where builds differ in bytes anyway, the shard of
  an earlier build is taken (``resources.index.shards``), points that went are deleted and new ones
  added, and all is laid out anew in one segment: no deleted point stays, which would count in
  BM25's document frequencies, and the int8 ranges are those of the vectors that are there. Points
  keep their ids, so ids no longer ascend as chunk ids do: order.bin says which is which.
* A graph may age where points come and go in it. So a shard of which a fifth has changed since it
  was built from nothing is not updated again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import InputError
from contracts.params import Index
from contracts.records import Chunk
from resources.index import sparse
from resources.index.filters import FIELDS
from resources.index.manifest import (
    DOCUMENTS,
    ORDER,
    content_id,
    list_files,
    recipe,
    row_bytes,
    write_manifest,
)
from resources.index.search import DENSE, WORDS
from resources.index.shards import Earlier, ShardCache

if TYPE_CHECKING:
    import numpy as np

#: exact: every float32 vector is scanned; int8: every int8 copy, the best are rescored.
Kind = Literal["exact", "int8", "graph"]

#: The payload field that is indexed: "source=docs", "doc_id=docs:a.md" …
TAGS = "tags"

#: Share of an index that may have changed before it is built from nothing again.
MOST_CHANGED = 0.2


@dataclass(frozen=True)
class Points:
    """What goes into a shard, by chunk id: payloads, unit vectors (float32), payloads as bytes."""

    rows: Sequence[dict[str, Any]]
    vectors: np.ndarray
    lines: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digests(self) -> list[bytes]:
        """SHA-256 of each point's payload and vector."""
        return [
            hashlib.sha256(line + vector.tobytes()).digest()
            for line, vector in zip(self.lines, self.vectors, strict=True)
        ]

    def add(self, shard: Any, number: int, id: int) -> None:
        """Hand one over to the engine."""
        import qdrant_edge as edge

        row = self.rows[number]
        words = edge.SparseVector(*sparse.of_document(row))
        marks = [tag for name in FIELDS.values() for tag in tags(name, [row[name]])]
        vectors = {DENSE: self.vectors[number].tolist(), WORDS: words}
        point = edge.Point(id, vectors, {**row, TAGS: marks})
        shard.update(edge.UpdateOperation.upsert_points([point]))


def tags(field: str, values: Sequence[str | None]) -> list[str]:
    """What stands in the payload field :data:`TAGS` for those values of another."""
    return [f"{field}={value}" for value in values if value is not None]


def kind_of(count: int, params: Index) -> Kind:
    """How an index of this many chunks is searched."""
    if count > params.exact_below:
        return "graph"
    return "int8" if count > params.quantise_above else "exact"


def build_index(
    path: Path,
    chunks: Sequence[Chunk] | Sequence[Mapping[str, Any]],
    vectors: np.ndarray,
    params: Index,
    model: dict[str, Any],
    shards: ShardCache | None = None,
) -> dict[str, Any]:
    """Build the directory ``path`` (what stood there goes) and return its manifest.

    Args:
        path: where the index goes.
        chunks: chunks, or their fields as read from Parquet (which saves 1 s at 50,000).
        vectors: float32, (len(chunks), dimension), rows of length 1.
        params: graph parameters; up to ``exact_below`` chunks no graph is built, above
            ``quantise_above`` the vectors are kept as int8 too.
        model: ``Embedder.describe()`` of the model that made the vectors.
        shards: where earlier builds left theirs, and this one leaves its own; None: from nothing.

    The manifest lacks ``recall`` until :func:`certify` adds it. Its content id follows from
    ``chunks``, ``vectors``, ``params`` and ``model`` alone, whatever ``shards`` held.
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
    points = Points(rows, vectors.astype("<f4", copy=False), [row_bytes(row) for row in rows])
    kind = kind_of(len(rows), params)
    ids = write_shard(path, points, params, kind, shards)
    if ids != list(range(len(ids))):
        (path / ORDER).write_bytes(array("I", ids).tobytes())
    found = sorted({row["doc_id"] for row in rows})
    (path / DOCUMENTS).write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", "utf-8")
    made = recipe(params, model, sparse.RECIPE)
    manifest = {
        "format": made["format"],
        "engine": _engine(),
        "content": content_id(points.lines, points.vectors, made),
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


def write_shard(
    path: Path, points: Points, params: Index, kind: Kind, shards: ShardCache | None
) -> list[int]:
    """The engine's files in an empty folder ``path``; returns the engine's id of each point."""
    _empty(path)
    if shards is None or kind == "exact":
        return _from_nothing(path, points, params, kind)
    key = shard_key(points, params, kind)
    earlier = shards.take(key, path)
    done = _updated(path, points, params, kind, earlier) if earlier else None
    shards.reused = done is not None
    if done is None:
        _empty(path)
        done = _from_nothing(path, points, params, kind), 0
    ids, changed = done
    if len(set(points.digests)) == len(points):  # equal points cannot be told apart
        shards.keep(key, path, zip(points.digests, ids, strict=True), changed)
    return ids


def shard_key(points: Points, params: Index, kind: Kind) -> str:
    """Names all but the points that a shard follows from: 32 hex digits."""
    code = [Path(file).read_bytes() for file in (__file__, sparse.__file__)]
    graph = [params.hnsw_m, params.ef_construct] if kind == "graph" else None
    said = [_engine(), kind, graph, int(points.vectors.shape[1]), sorted(points.rows[0]), FIELDS]
    return hashlib.sha256(b"\0".join([*code, json.dumps(said).encode()])).hexdigest()[:32]


def _engine() -> str:
    return f"qdrant-edge {version('qdrant-edge-py')}"


def _empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _from_nothing(path: Path, points: Points, params: Index, kind: Kind) -> list[int]:
    import qdrant_edge as edge

    shard = edge.EdgeShard.create(str(path), _config(points, params, kind))
    keyword = edge.PayloadSchemaType.Keyword
    shard.update(edge.UpdateOperation.create_field_index(TAGS, keyword))
    ids = list(range(len(points)))
    for number in ids:
        points.add(shard, number, number)
    _finish(path, shard, _config(points, params, kind))
    return ids


def _updated(
    path: Path, points: Points, params: Index, kind: Kind, earlier: Earlier
) -> tuple[list[int], int] | None:
    """Bring the shard in ``path`` up to date.

    Returns the ids of the points and how many have changed since a build from nothing; None where
    the shard is better built from nothing.
    """
    import qdrant_edge as edge

    fresh = [number for number, digest in enumerate(points.digests) if digest not in earlier.ids]
    wanted = set(points.digests)
    gone: list[Any] = [id for digest, id in earlier.ids.items() if digest not in wanted]
    changed = earlier.changed + len(fresh) + len(gone)
    if changed > MOST_CHANGED * len(points):
        return None
    known = dict(earlier.ids)
    following = max(known.values(), default=-1) + 1
    for id, number in enumerate(fresh, following):
        known[points.digests[number]] = id
    try:
        shard = edge.EdgeShard.load(str(path), _config(points, params, kind, lay_out_anew=True))
        if gone:
            shard.update(edge.UpdateOperation.delete_points(gone))
        for number in fresh:
            points.add(shard, number, known[points.digests[number]])
        count = shard.count(edge.CountRequest(exact=True))
        _finish(path, shard, _config(points, params, kind))
    except Exception:  # the engine raises bare Exception; a build from nothing always works
        return None
    if count != len(points):
        return None
    return [known[digest] for digest in points.digests], changed


def _finish(path: Path, shard: Any, config: Any) -> None:
    """Lay the points out in one segment, under names that do not change from build to build."""
    import qdrant_edge as edge

    shard.optimize()
    shard.flush()
    shard.close()
    edge.EdgeShard.load(str(path), config).close()
    for listed in path.rglob("payload_index/config.json"):
        text = json.dumps(json.loads(listed.read_text("utf-8")), sort_keys=True)
        listed.write_text(text, encoding="utf-8")
    segments = sorted(
        (path / "segments").iterdir(),
        key=lambda folder: (-(folder / f"vector_index-{DENSE}").exists(), folder.name),
    )
    for number, folder in enumerate(segments):
        folder.rename(folder.with_name(f"00000000-0000-4000-8000-{number:012d}"))


def _config(points: Points, params: Index, kind: Kind, lay_out_anew: bool = False) -> Any:
    """The engine's settings; with ``lay_out_anew`` one deleted point is enough to do so."""
    import qdrant_edge as edge

    dimension = int(points.vectors.shape[1])
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
            default_segment_number=1,
            indexing_threshold=never if kind == "exact" else 1,
            deleted_threshold=1e-9 if lay_out_anew else None,
            vacuum_min_vector_number=1 if lay_out_anew else None,
        ),
        max_search_threads=1,
        wal_enabled=False,
    )
