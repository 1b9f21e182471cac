"""The vector index: an immutable directory named by its content, searched in-process.

In: chunks and their vectors. Out: a directory with

    edge_config.json, segments/   qdrant-edge's own files (Qdrant's engine, one shard)
    manifest.json                 written last: content id, counts, model, recall, file sizes

A directory without its manifest is not an index: a build that died leaves nothing to open.

What qdrant-edge 0.9 needs to be told, each measured:

* Its write-ahead log locks out a second process; without it several may read at once.
* Points upserted in one batch are laid out in hash order, which differs in every run. One point an
  operation keeps the order and costs nothing (0.3 s for 10,000). Segments get random names: they
  are renamed. Then two builds of the same input are byte-identical, as long as search is exact.
* Its HNSW graph draws random levels and takes no seed, so above ``exact_below`` chunks the graph
  files differ from build to build (vectors, payload and the content id do not).
* The first load after a build changes files: it fills in edge_config.json and removes a journal
  that small shards leave behind. So a build ends with a load; after that no load changed a byte.
* Even then each load writes: it replaces edge_config.json and segment.json by the same bytes, and
  dirties pages of flags and payload. So an index is opened as a private copy
  (:func:`_private_copy`), and its directory is only ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from contracts.errors import InputError
from contracts.params import Index
from contracts.records import Chunk

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Hit:
    """A chunk and its cosine similarity to the query, -1 to 1."""

    chunk: Chunk
    score: float


class VectorIndex(Protocol):
    """What retrieval needs of an engine."""

    manifest: dict[str, Any]

    @property
    def count(self) -> int:
        """Chunks in the index."""

    def search(self, vector: np.ndarray, k: int, exact: bool | None = None) -> list[Hit]:
        """The ``k`` nearest chunks, nearest first; ties by chunk id.

        Args:
            vector: float32, (dimension,), length 1.
            k: at least 1; fewer come back from a smaller index.
            exact: True scans everything, False lets the engine use its graph, None does what the
                index was built for.
        """

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk, in the order of the build."""

    def close(self) -> None:
        """Give the files back. Searching afterwards is an error."""


class EdgeIndex:
    """A :class:`VectorIndex` over a qdrant-edge directory, opened by :func:`open_index`."""

    def __init__(self, shard: Any, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._shard = shard

    @property
    def count(self) -> int:
        return int(self.manifest["count"])

    def search(self, vector: np.ndarray, k: int, exact: bool | None = None) -> list[Hit]:
        import qdrant_edge as edge

        request = edge.QueryRequest(
            limit=k,
            query=edge.Query.Nearest([float(value) for value in vector]),
            with_payload=True,
            params=edge.SearchParams(exact=self.manifest["exact"] if exact is None else exact),
        )
        hits = [
            Hit(Chunk.model_validate(point.payload), float(point.score))
            for point in self._shard.query(request)
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.chunk.chunk_id))

    def chunks(self) -> Iterator[Chunk]:
        step = 1000
        for start in range(0, self.count, step):
            ids = list(range(start, min(start + step, self.count)))
            points = self._shard.retrieve(ids, with_payload=True, with_vector=False)
            for point in sorted(points, key=lambda item: item.id):
                yield Chunk.model_validate(point.payload)

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> EdgeIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_index(
    path: Path,
    chunks: Sequence[Chunk],
    vectors: np.ndarray,
    params: Index,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Build the directory ``path`` (what stood there goes) and return its manifest.

    Args:
        path: where the index goes.
        chunks: the payload, in the order of the points.
        vectors: float32, (len(chunks), dimension), rows of length 1.
        params: graph parameters; up to ``exact_below`` chunks no graph is built.
        model: ``Embedder.describe()`` of the model that made the vectors.

    The manifest lacks ``recall`` until :func:`certify` adds it.
    """
    if len(chunks) != len(vectors) or not chunks:
        raise InputError(
            f"An index needs one vector a chunk; there are {len(chunks)} chunks and "
            f"{len(vectors)} vectors.",
            where=str(path),
            next="run the stages chunks and vectors again",
        )
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    exact = len(chunks) <= params.exact_below
    _write_shard(path, chunks, vectors, params, exact)
    manifest = {
        "format": FORMAT,
        "engine": f"qdrant-edge {version('qdrant-edge-py')}",
        "content": content_id(chunks, vectors, params, model),
        "count": len(chunks),
        "dimension": int(vectors.shape[1]),
        "distance": "cosine, as the dot product of unit vectors",
        "exact": exact,
        "hnsw": None if exact else {"m": params.hnsw_m, "ef_construct": params.ef_construct},
        "model": model,
        "files": {
            item.relative_to(path).as_posix(): item.stat().st_size
            for item in sorted(path.rglob("*"))
            if item.is_file()
        },
    }
    _write_manifest(path, manifest)
    return manifest


def certify(path: Path, recall: dict[str, float]) -> dict[str, Any]:
    """Add the measured recall to the manifest of a just built index."""
    manifest = {**read_manifest(path), "recall": recall}
    _write_manifest(path, manifest)
    return manifest


def content_id(
    chunks: Sequence[Chunk], vectors: np.ndarray, params: Index, model: dict[str, Any]
) -> str:
    """SHA-256 of what the index holds and how it was to be built, whatever the engine's files."""
    digest = hashlib.sha256()
    config = {"hnsw_m": params.hnsw_m, "ef_construct": params.ef_construct}
    config |= {"exact_below": params.exact_below}
    digest.update(json.dumps({"config": config, "model": model}, sort_keys=True).encode())
    for chunk in chunks:
        digest.update(f"{chunk.chunk_id}\0{chunk.text_sha}\0{chunk.heading}\0".encode())
    digest.update(vectors.astype("<f4").tobytes())
    return digest.hexdigest()


def _write_shard(
    path: Path, chunks: Sequence[Chunk], vectors: np.ndarray, params: Index, exact: bool
) -> None:
    """The engine's files, under names that do not change from build to build."""
    import qdrant_edge as edge

    never = 10**9  # KB of vectors; no shard gets there
    config = edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(size=int(vectors.shape[1]), distance=edge.Distance.Dot),
        hnsw_config=edge.HnswIndexConfig(
            m=params.hnsw_m,
            ef_construct=params.ef_construct,
            full_scan_threshold=10,  # KB; its smallest: whoever asks for the graph gets it
            max_indexing_threads=1,
        ),
        optimizers=edge.EdgeOptimizersConfig(
            default_segment_number=1, indexing_threshold=never if exact else 1
        ),
        max_search_threads=1,
        wal_enabled=False,
    )
    shard = edge.EdgeShard.create(str(path), config)
    for number, (chunk, vector) in enumerate(zip(chunks, vectors, strict=True)):
        point = edge.Point(id=number, vector=vector.tolist(), payload=chunk.model_dump())
        shard.update(edge.UpdateOperation.upsert_points([point]))
    shard.optimize()
    shard.flush()
    shard.close()
    edge.EdgeShard.load(str(path)).close()
    segments = sorted(
        (path / "segments").iterdir(),
        key=lambda folder: (-(folder / "vector_index").exists(), folder.name),
    )
    for number, folder in enumerate(segments):
        folder.rename(folder.with_name(f"00000000-0000-4000-8000-{number:012d}"))


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    part = path / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path / MANIFEST)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole index directory. Raises InputError listing what is wrong."""
    rebuild = "build it again: dvc repro index (or dvc pull index)"
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known, files = manifest["format"], manifest["files"]
        _ = manifest["count"], manifest["exact"], manifest["model"]["digest"], manifest["content"]
    except FileNotFoundError:
        what = "There is no index here." if not path.is_dir() else "This index is unfinished."
        raise InputError(what, where=str(path / MANIFEST), next=rebuild) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The manifest of this index cannot be read: {error!r}.",
            where=str(path / MANIFEST),
            next=rebuild,
        ) from None
    if known != FORMAT:
        raise InputError(
            f"This index has format {known}; this version reads format {FORMAT}.",
            where=str(path / MANIFEST),
            next=rebuild,
        )
    wrong = list(_damage(path, files))
    if wrong:
        raise InputError("This index is damaged.", offenders=wrong, where=str(path), next=rebuild)
    return manifest


def _damage(path: Path, files: dict[str, int]) -> Iterable[str]:
    """Files of the manifest that are missing or have another length."""
    for name, length in files.items():
        item = path / name
        if not item.is_file():
            yield f"{name}: missing"
        elif item.stat().st_size != length:
            yield f"{name}: {item.stat().st_size} bytes, not {length}"


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
            if name != MANIFEST:
                _copy_sparse(Path(folder) / name, here / name)
    return copy


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file; blocks of zeros become holes."""
    block = 1 << 16
    zeros = bytes(block)
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(block):
            if data == zeros:
                writer.seek(block, os.SEEK_CUR)
            else:
                writer.write(data)
        writer.truncate()
