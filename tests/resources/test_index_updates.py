"""Builds that go on from an earlier one: the same answers, whatever the cache holds or lacks."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from contracts.digests import dir_md5
from contracts.params import Index, Search
from contracts.records import Chunk, Filter
from resources.index import ShardCache, build_index, open_index
from resources.index.files import copy_tree
from tests.resources.indexes import MODEL, PARAMS, chunk, vectors_of

INT8 = PARAMS.model_copy(update={"quantise_above": 20})
GRAPH = PARAMS.model_copy(update={"exact_below": 20, "quantise_above": 10})
WORDS = ["gate", "rollback", "release", "index", "bread", "schedule", "sensor", "partition"]


def document(name: str, edition: int) -> list[Chunk]:
    """Three chunks whose words and places follow from the name and the edition."""
    draw = random.Random(f"{name} {edition}")
    return [
        chunk(f"docs:{name}", start, " ".join([*draw.choices(WORDS, k=draw.randint(2, 9)), name]),
              language=draw.choice(["en", "de"]))
        for start in (0, 100, 200 + edition)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the shard of BASE; an index costs 0.3 s, mostly for 130 MB of zeros."""
    folder = tmp_path_factory.mktemp("base")
    build(folder / "index", corpus(BASE), INT8, ShardCache(folder / "shards"))
    return folder / "shards"


@pytest.fixture
def shards(base: Path, tmp_path: Path) -> ShardCache:
    """A cache of its own with that shard."""
    copy_tree(base, tmp_path / "shards")
    return ShardCache(tmp_path / "shards")


def corpus(editions: dict[str, int]) -> list[Chunk]:
    return [item for name, edition in editions.items() for item in document(name, edition)]


BASE = {f"{number:03}": 0 for number in range(0, 200, 2)}


def build(path: Path, chunks: list[Chunk], params: Index, shards: ShardCache | None) -> str:
    content = build_index(path, chunks, vectors_of(chunks), params, MODEL, shards)["content"]
    return str(content)


def answers(path: Path, exact: bool | None) -> list[object]:
    """What the index says to questions of every kind, and all that it holds, in order."""
    found: list[object] = []
    with open_index(path) as index:
        found += index.chunks()
        found += [
            (number, row, vectors["words"].indices)
            for batch in index.points()
            for number, row, vectors in batch
        ]
        filters = None, Filter(languages=["de"]), Filter(without_documents=["docs:004"])
        draw = np.random.default_rng(5).normal(size=(4, 8)).astype(np.float32)
        for number, vector in enumerate(draw / np.linalg.norm(draw, axis=1, keepdims=True)):
            text = f"{WORDS[number]} {WORDS[-number]}"
            for mode in ("dense", "sparse", "fused"):
                how = Search(mode=mode)
                for only in filters:
                    found += index.search(vector, 7, exact=exact, text=text, search=how, only=only)
    return found


def changed(editions: dict[str, int], draw: random.Random) -> dict[str, int]:
    """A few documents edited, removed, added."""
    editions = dict(editions)
    for name in draw.sample(sorted(editions), 2):
        editions[name] += 1
    del editions[draw.choice(sorted(editions))]
    new = draw.choice([name for n in range(200) if (name := f"{n:03}") not in editions])
    editions[new] = 7
    return dict(sorted(editions.items()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_updated_index_answers_as_one_from_nothing(tmp_path: Path, seed: int) -> None:
    draw, editions, shards = random.Random(seed), BASE, ShardCache(tmp_path / "shards")
    for generation in range(4):
        content = build(tmp_path / "index", corpus(editions), INT8, shards)
        assert shards.reused == (generation > 0)
        assert content == build(tmp_path / "quiet", corpus(editions), INT8, None)
        assert answers(tmp_path / "index", None) == answers(tmp_path / "quiet", None)
        editions = changed(editions, draw)


@pytest.mark.parametrize(
    "change",
    [
        lambda editions: {**editions, "002": 1},
        lambda editions: {name: n for name, n in editions.items() if name != "002"},
        lambda editions: dict(sorted({**editions, "001": 0}.items())),
        lambda editions: editions,
    ],
    ids=["edit", "delete", "add", "none"],
)
def test_one_change_alone(
    shards: ShardCache, tmp_path: Path, change: Callable[[dict[str, int]], dict[str, int]]
) -> None:
    """Deletions alone: the engine would keep the points, and count them in BM25's frequencies."""
    content = build(tmp_path / "index", corpus(change(BASE)), INT8, shards)
    assert shards.reused
    assert content == build(tmp_path / "quiet", corpus(change(BASE)), INT8, None)
    assert answers(tmp_path / "index", None) == answers(tmp_path / "quiet", None)


def test_an_updated_graph_finds_what_exact_search_finds(tmp_path: Path) -> None:
    shards = ShardCache(tmp_path / "shards")
    build(tmp_path / "index", corpus(BASE), GRAPH, shards)
    build(tmp_path / "index", corpus({**BASE, "001": 0, "002": 1}), GRAPH, shards)
    assert shards.reused
    assert answers(tmp_path / "index", None) == answers(tmp_path / "index", True)


@pytest.mark.slow
def test_after_many_changes_it_is_built_from_nothing(tmp_path: Path) -> None:
    """Ten documents of three chunks, gone and new: 60 points, a fifth of 300."""
    shards, editions, reused = ShardCache(tmp_path / "shards"), BASE, []
    for edited in (0, 10, 1, 1):
        fresh = [name for name, edition in editions.items() if not edition][:edited]
        editions = {**editions, **dict.fromkeys(fresh, 1)}
        build(tmp_path / "index", corpus(editions), INT8, shards)
        reused.append(shards.reused)
    assert reused == [False, True, False, True]


@pytest.mark.slow
def test_what_does_not_shape_the_shard_does_not_rebuild_it(tmp_path: Path) -> None:
    shards, reused, contents = ShardCache(tmp_path / "shards"), [], []
    for params in (
        INT8,
        INT8.model_copy(update={"search": Search(mode="sparse")}),
        GRAPH,
        GRAPH.model_copy(update={"hnsw_m": 8}),
        GRAPH,  # the way back
    ):
        contents.append(build(tmp_path / "index", corpus(BASE), params, shards))
        reused.append(shards.reused)
    assert reused == [False, True, False, False, True]
    assert len(set(contents)) == 4 and contents[2] == contents[4]
    assert len([item for item in shards.folder.iterdir() if item.is_dir()]) == 2


def test_a_small_index_leaves_nothing_and_keeps_its_bytes(tmp_path: Path) -> None:
    shards = ShardCache(tmp_path / "shards")
    build(tmp_path / "index", corpus({**BASE, "001": 0}), PARAMS, shards)
    build(tmp_path / "index", corpus(BASE), PARAMS, shards)
    build(tmp_path / "quiet", corpus(BASE), PARAMS, None)
    assert dir_md5(tmp_path / "index") == dir_md5(tmp_path / "quiet")
    assert not shards.folder.exists()


def _entry(shards: ShardCache) -> Path:
    (entry,) = (item for item in shards.folder.iterdir() if item.is_dir())
    return entry


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text('{"changed": 0, "fil'),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "points.bin").unlink(),
        lambda entry: _flip(entry / "points.bin"),
        lambda entry: _flip(next(entry.rglob("matrix.dat"))),
        lambda entry: next(entry.rglob("segment.json")).unlink(),
        lambda entry: (entry / "shard" / "stray").write_text("x"),
    ],
    ids=["gone", "torn", "foreign", "no points", "points", "vectors", "segment", "stray"],
)
def test_a_damaged_entry_is_none(
    shards: ShardCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    recipe = _entry(shards).name
    assert shards.take(recipe, tmp_path / "whole") is not None
    damage(_entry(shards))
    assert shards.take(recipe, tmp_path / "damaged") is None


def test_an_entry_that_the_engine_cannot_load_is_replaced(
    shards: ShardCache, tmp_path: Path
) -> None:
    """Whole by its checksums, and yet not what its name says: a build from nothing."""
    entry = _entry(shards)
    earlier = shards.take(entry.name, tmp_path / "whole")
    assert earlier is not None
    next((entry / "shard").rglob("segment.json")).write_text("{}")
    foreign = entry.rename(tmp_path / "foreign")
    shards.keep(entry.name, foreign / "shard", earlier.ids.items(), 0)
    build(tmp_path / "index", corpus(BASE), INT8, shards)
    first = shards.reused
    build(tmp_path / "index", corpus(BASE), INT8, shards)
    assert (first, shards.reused) == (False, True)


@pytest.mark.slow
def test_builds_at_once_are_each_right(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    build(tmp_path / "index", corpus(BASE), INT8, ShardCache(folder))
    versions = [{**BASE, "001": edition, "002": edition} for edition in range(4)]

    def one(number: int) -> str:
        chunks = corpus(dict(sorted(versions[number % 4].items())))
        return build(tmp_path / f"index{number}", chunks, INT8, ShardCache(folder))

    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(one, range(8)))
    assert contents[:4] == contents[4:] and len(set(contents)) == 4
    for number in range(4):
        build(tmp_path / "quiet", corpus(dict(sorted(versions[number].items()))), INT8, None)
        assert answers(tmp_path / f"index{number}", None) == answers(tmp_path / "quiet", None)
    last = ShardCache(folder)
    build(tmp_path / "index", corpus(BASE), INT8, last)
    assert last.reused  # what stayed is whole


BUILDER = """
import os, signal, sys
from pathlib import Path
from resources.index import ShardCache
from tests.resources.test_index_updates import BASE, INT8, build, corpus

kill_at, seen = int(sys.argv[2]), 0

def hook(event, args):
    global seen
    if event in ("os.rename", "shutil.rmtree"):
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
folder = Path(sys.argv[1])
build(folder / "index", corpus({**BASE, "002": 1}), INT8, ShardCache(folder / "shards"))
"""


@pytest.mark.slow
def test_a_killed_build_leaves_a_whole_entry_or_none(tmp_path: Path) -> None:
    """Killed at each rename and removal in turn, until one build gets through."""
    for kill_at in range(1, 40):
        build(tmp_path / "index", corpus(BASE), INT8, ShardCache(tmp_path / "shards"))
        command = [sys.executable, "-c", BUILDER, str(tmp_path), str(kill_at)]
        code = subprocess.run(command, check=False, timeout=120).returncode
        shards = ShardCache(tmp_path / "shards")
        content = build(tmp_path / "after", corpus(BASE), INT8, shards)
        assert content == build(tmp_path / "quiet", corpus(BASE), INT8, None)
        assert answers(tmp_path / "after", None) == answers(tmp_path / "quiet", None)
        names = [item.name for item in shards.folder.iterdir() if item.is_dir()]
        assert len(names) == 1 and "." not in names[0]  # nothing half stays
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kill_at > 5 and code == 0
