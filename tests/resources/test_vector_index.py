"""The index directory: right answers, the same bytes, read by many, refused when damaged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracts.digests import dir_md5, text_sha
from contracts.errors import InputError
from contracts.params import Index
from contracts.records import Chunk
from resources.index import MANIFEST, build_index, certify, open_index
from resources.index.edge import _private_copy

MODEL = {"name": "test", "dtype": "float32", "digest": "d" * 64, "dimension": 384}
EXACT = Index(hnsw_m=16, ef_construct=64, exact_below=50_000, min_recall=0.9, probes=20)
GRAPH = EXACT.model_copy(update={"exact_below": 10})


def make(count: int) -> tuple[list[Chunk], np.ndarray]:
    """Chunks, and unit vectors in 20 clusters, as text has them."""
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(20, 384))[np.arange(count) % 20] + draw.normal(size=(count, 384))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chunks = [
        Chunk(
            chunk_id=f"docs:a.md#{1000 + n}-{1001 + n}",
            doc_id="docs:a.md",
            source="docs",
            path="a.md",
            title="Ä",
            heading="H > I",
            start=n,
            end=n + 1,
            tokens=1,
            text_sha=text_sha(f"t{n}"),
            text=f"t{n}",
        )
        for n in range(count)
    ]
    return chunks, vectors.astype(np.float32)


@pytest.fixture(scope="module")
def data() -> tuple[list[Chunk], np.ndarray]:
    return make(400)


@pytest.fixture(scope="module")
def built(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "index"
    build_index(path, *data, EXACT, MODEL)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def truth(vectors: np.ndarray, probe: np.ndarray, k: int) -> list[int]:
    return list(np.argsort(-(vectors @ probe), kind="stable")[:k])


def test_exact_search_is_numpys(built: Path, data: Any) -> None:
    chunks, vectors = data
    with open_index(built) as index:
        assert index.count == 400 and index.manifest["exact"]
        assert list(index.chunks()) == chunks
        for number in (0, 57, 399):
            hits = index.search(vectors[number], 7)
            assert [hit.chunk for hit in hits] == [
                chunks[i] for i in truth(vectors, vectors[number], 7)
            ]
            assert hits[0].score == pytest.approx(1, abs=1e-5)
            assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
        assert len(index.search(vectors[0], 1000)) == 400


def test_the_same_input_gives_the_same_bytes(built: Path, data: Any, tmp_path: Path) -> None:
    manifest = build_index(tmp_path / "again", *data, EXACT, MODEL)
    assert dir_md5(tmp_path / "again") == dir_md5(built)
    other = build_index(tmp_path / "other", data[0][1:], data[1][1:], EXACT, MODEL)
    assert other["content"] != manifest["content"]


def test_reading_changes_nothing(built: Path, data: Any) -> None:
    def states() -> dict[Path, tuple[int, ...]]:
        items = {item: item.stat() for item in built.rglob("*")}
        return {item: (s.st_mtime_ns, s.st_ino, s.st_mode) for item, s in items.items()}

    before, md5 = states(), dir_md5(built)
    with open_index(built) as first, open_index(built) as second:
        assert first.search(data[1][3], 1)[0].chunk == second.search(data[1][3], 1)[0].chunk
    assert (states(), dir_md5(built)) == (before, md5)


READER = """
import sys, numpy as np
from pathlib import Path
from resources.index import open_index
index = open_index(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
print(index.search(np.load(sys.argv[2]), 1)[0].chunk.chunk_id, flush=True)
index.close()
"""


def test_several_processes_read_at_once(built: Path, data: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "probe.npy", data[1][7])
    command = [sys.executable, "-c", READER, str(built), str(tmp_path / "probe.npy")]
    pipe = subprocess.PIPE
    readers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)
    ]
    try:
        for reader in readers:  # all hold it open before any searches
            assert reader.stdout is not None and reader.stdout.readline() == "open\n"
        answers = [reader.communicate("go\n", timeout=60) for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    assert answers == [(data[0][7].chunk_id + "\n", "")] * 3


def test_a_read_only_directory_is_read_and_nothing_is_left(
    copy: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DVC checks out with links: the files are read-only, and the cache's own."""
    for item in sorted(copy.rglob("*"), reverse=True):
        item.chmod(0o555 if item.is_dir() else 0o444)
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    with open_index(copy) as index:
        assert list(private.iterdir()) == []  # not even a killed reader leaves its copy
        assert index.search(data[1][5], 1)[0].chunk == data[0][5]
        assert len(list(index.chunks())) == 400


def test_the_private_copy_has_holes(built: Path) -> None:
    made = _private_copy(built)
    used = sum(item.stat().st_blocks * 512 for item in made.rglob("*") if item.is_file())
    apparent = sum(item.stat().st_size for item in made.rglob("*") if item.is_file())
    shutil.rmtree(made)
    assert used < 8 << 20 < 60 << 20 < apparent


def test_the_graph_finds_what_exact_search_finds(data: Any, tmp_path: Path) -> None:
    chunks, vectors = data
    manifest = build_index(tmp_path / "graph", chunks, vectors, GRAPH, MODEL)
    assert manifest["hnsw"] == {"m": 16, "ef_construct": 64} and not manifest["exact"]
    assert manifest["kind"] == "graph"
    assert any("links" in name for name in manifest["files"])
    with open_index(tmp_path / "graph") as index:
        shares = []
        for number in range(0, 400, 20):
            best = {chunks[i].chunk_id for i in truth(vectors, vectors[number], 10)}
            found = {hit.chunk.chunk_id for hit in index.search(vectors[number], 10)}
            exact = {hit.chunk.chunk_id for hit in index.search(vectors[number], 10, exact=True)}
            assert exact == best
            shares.append(len(best & found) / 10)
        assert np.mean(shares) > 0.9


def test_an_int8_scan_is_rescored_to_the_exact_answer(data: Any, tmp_path: Path) -> None:
    chunks, vectors = data
    params = EXACT.model_copy(update={"quantise_above": 100})
    manifest = build_index(tmp_path / "int8", chunks, vectors, params, MODEL)
    assert (manifest["kind"], manifest["exact"], manifest["hnsw"]) == ("int8", False, None)
    assert any("quantized" in name for name in manifest["files"])
    again = build_index(tmp_path / "again", chunks, vectors, params, MODEL)
    assert again["content"] == manifest["content"]
    with open_index(tmp_path / "int8") as index:
        for number in range(0, 400, 20):
            hits = index.search(vectors[number], 10)
            assert hits == index.search(vectors[number], 10, exact=True)
            best = truth(vectors, vectors[number], 10)
            assert [hit.chunk for hit in hits] == [chunks[i] for i in best]
            assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_certify_adds_recall(copy: Path) -> None:
    assert certify(copy, {"recall_at_10": 0.5})["recall"] == {"recall_at_10": 0.5}
    with open_index(copy) as index:
        assert index.manifest["recall"] == {"recall_at_10": 0.5}


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def _torn_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"format": 2, "cou')


def _other_format(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))


def _no_count(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["count"]
    (path / MANIFEST).write_text(json.dumps(manifest))


def _missing_file(path: Path) -> None:
    next(path.rglob("chunk_0.mmap")).unlink()


def _truncated_file(path: Path) -> None:
    with next(path.rglob("page_0.dat")).open("r+b") as stream:
        stream.truncate(100)


def _garbage(path: Path) -> None:
    file = next(path.rglob("segment.json"))
    file.write_text("x" * file.stat().st_size)


def _gone(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_no_manifest, "unfinished"),
        (_torn_manifest, "cannot be read"),
        (_no_count, "count"),
        (_other_format, "format 99"),
        (_missing_file, "chunk_0.mmap: missing"),
        (_truncated_file, "page_0.dat: 100 bytes"),
        (_garbage, "cannot load"),
        (_gone, "no index here"),
    ],
)
def test_a_damaged_directory_is_refused_with_the_next_step(
    copy: Path, break_it: Any, words: str
) -> None:
    break_it(copy)
    with pytest.raises(InputError, match=words) as caught:
        open_index(copy)
    assert str(copy) in str(caught.value) and "dvc repro index" in str(caught.value)


def test_chunks_and_vectors_must_pair(data: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="399 chunks and 400 vectors"):
        build_index(tmp_path / "x", data[0][1:], data[1], EXACT, MODEL)
    with pytest.raises(InputError, match="0 chunks"):
        build_index(tmp_path / "x", [], data[1][:0], EXACT, MODEL)


BUILDER = """
import os, signal, sys
from pathlib import Path
from resources.index import build_index, certify
from tests.resources.test_vector_index import EXACT, MODEL, make

kill_at, seen = int(sys.argv[2]), 0
chunks, vectors = make(40)

def hook(event, args):
    global seen
    seen += event == "os.rename"
    if event == "os.rename" and seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
build_index(Path(sys.argv[1]), chunks, vectors, EXACT, MODEL)
certify(Path(sys.argv[1]), {"recall_at_10": 1.0})
"""


@pytest.mark.slow
def test_a_build_that_was_killed_is_no_index_and_the_next_finishes(tmp_path: Path) -> None:
    """Renames are its steps: the segment, the manifest, the manifest with recall."""
    path = tmp_path / "index"

    def build(kill_at: int) -> int:
        command = [sys.executable, "-c", BUILDER, str(path), str(kill_at)]
        return subprocess.run(command, check=False, timeout=120).returncode

    for kill_at in (1, 2):
        assert build(kill_at) == -signal.SIGKILL
        with pytest.raises(InputError, match="unfinished"):
            open_index(path)
    assert build(3) == -signal.SIGKILL
    with open_index(path) as index:  # whole, yet without recall: a publish refuses it
        assert index.count == 40 and "recall" not in index.manifest
    assert build(4) == 0
    manifest = build_index(tmp_path / "quiet", *make(40), EXACT, MODEL)
    certify(tmp_path / "quiet", {"recall_at_10": 1.0})
    assert dir_md5(path) == dir_md5(tmp_path / "quiet") and manifest["count"] == 40
