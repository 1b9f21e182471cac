"""Readers of the published index: never an error, never a mixture, never a deleted text."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient

from contracts.errors import InputError, NotFoundError, ServiceError
from contracts.params import Search
from contracts.records import Filter
from contracts.settings import Settings
from resources import published
from resources.index import MANIFEST, server
from resources.published import collect, publish, rollback, versions
from resources.published_reader import PublishedIndex, open_published
from tests.resources.indexes import chunk, make_index, policy_for, vectors_of

VECTOR = vectors_of([chunk("docs:1.md", 0, "1.md part 0 a")])[0]
NAMES = {"a": ["1.md", "2.md"], "b": ["1.md", "3.md"], "c": ["1.md", "2.md", "4.md"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("made")
    return {tag: make_index(home / tag, names, tag=tag) for tag, names in NAMES.items()}


@pytest.fixture(params=["edge", "server"])
def place(request: pytest.FixtureRequest, settings: Settings, monkeypatch: Any) -> Settings:
    """Settings of a checkout alone, and of one with a Qdrant server (the client's local mode)."""
    if request.param == "edge":
        return settings
    client = QdrantClient(":memory:")
    monkeypatch.setattr(server, "connect", lambda _: client)
    monkeypatch.setenv("QDRANT_URL", "http://qdrant.invalid:6333")
    return Settings.from_env()


def put(index: Path, settings: Settings, keep: int = 3) -> dict[str, Any]:
    return publish(index, settings, policy_for(index, keep=keep))


def seen(reader: PublishedIndex, **options: Any) -> tuple[set[str], set[str]]:
    """(version tags, documents) of everything that a search returns."""
    hits = reader.search(VECTOR, 50, **options)
    return {hit.chunk.text[-1] for hit in hits}, {hit.chunk.path for hit in hits}


def test_a_reader_follows_the_pointer_and_shows_nothing_deleted(
    place: Settings, made: dict[str, Path]
) -> None:
    with pytest.raises(NotFoundError, match="No index has been published"):
        open_published(place)
    put(made["a"], place)
    reader = open_published(place)
    assert seen(reader) == ({"a"}, {"1.md", "2.md"}) and reader.count == 4
    put(made["b"], place)
    assert seen(reader) == ({"b"}, {"1.md", "3.md"})
    rollback(place)  # to a, whose 2.md was deleted
    for mode in ("dense", "sparse", "fused"):
        how = Search(mode=mode)  # type: ignore[arg-type]
        assert seen(reader, text="part", search=how) == ({"a"}, {"1.md"})
    assert seen(reader, only=Filter(paths=["2.md"])) == (set(), set())
    assert {item.path for item in reader.chunks()} == {"1.md"}
    assert seen(open_published(place)) == ({"a"}, {"1.md"})
    rollback(place, reader.manifest["content"][:12], restore=True)
    assert seen(reader) == ({"a"}, {"1.md", "2.md"})
    put(made["c"], place)
    assert seen(reader) == ({"c"}, {"1.md", "2.md", "4.md"})
    reader.close()


@pytest.mark.slow
def test_a_hundred_swaps_under_an_open_reader(settings: Settings, made: dict[str, Path]) -> None:
    """Versions are swapped, collected and published anew while two threads search all the time."""
    names = {tag: put(made[tag], settings)["version"] for tag in "bca"}
    reader, stop = open_published(settings), threading.Event()
    wrong: list[Any] = []
    tags: set[str] = set()

    def search() -> None:
        while not stop.is_set():
            try:
                found, documents = seen(reader)
                tags.update(found)
                if len(found) != 1 or not documents <= set(NAMES[next(iter(found))]):
                    wrong.append((found, documents))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(100):
            tag = "bca"[number % 3]
            if number % 10 == 0:
                collect(settings, keep=1)
            if (settings.state_dir / "indexes" / names[tag]).exists():
                rollback(settings, names[tag], restore=True)
            else:
                put(made[tag], settings)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert wrong == [] and tags == {"a", "b", "c"} and reader.problem is None
    events = [line["event"] for line in versions(settings)]
    assert len(events) - events.count("collect") == 103
    assert events.count("collect") > 1 and events.count("publish") > 4


def test_a_version_that_cannot_be_opened_leaves_the_old_one_serving(
    settings: Settings, made: dict[str, Path]
) -> None:
    put(made["b"], settings)
    put(made["a"], settings)
    reader = open_published(settings)
    stored = settings.state_dir / "indexes"
    other = next(item for item in stored.glob("*/") if item != published.published_path(settings))
    with next(other.rglob("page_0.dat")).open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(InputError, match="damaged"):
        rollback(settings)  # says so and moves nothing
    pointer = settings.state_dir / "published_index.json"
    text = pointer.read_text()
    now = published.published_path(settings).name
    pointer.write_text(text.replace(now, other.name).replace('["docs:3.md"]', '["docs:2.md"]'))
    assert seen(reader) == ({"a"}, {"1.md"})  # the old version, and the new list of the deleted
    assert reader.problem is not None and "page_0.dat: 100 bytes" in reader.problem
    with pytest.raises(InputError, match="damaged"):
        open_published(settings)
    (other / MANIFEST).unlink()
    with pytest.raises((InputError, OSError)):
        open_published(settings)
    pointer.write_text(text)
    assert seen(reader) == ({"a"}, {"1.md", "2.md"}) and reader.problem is None
    pointer.write_text("{")
    assert seen(reader) == ({"a"}, {"1.md", "2.md"}) and "cannot be read" in str(reader.problem)


# -- with a server -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["server"], indirect=True)
@pytest.mark.parametrize("step", ["upload", "promote"])
def test_a_publish_that_dies_at_the_server_is_finished_by_the_next(
    place: Settings, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = put(made["a"], place)
    reader = open_published(place)

    def die(*_: Any) -> None:
        raise ServiceError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(server, step, die)
        with pytest.raises(ServiceError, match="gone"):
            put(made["b"], place)
    client, now = server.connect(place), published.published(place)
    assert now is not None and (now["version"] == old["version"]) == (step == "upload")
    assert server.current(client) == f"ratchet-{old['version']}"
    assert seen(reader) == ({"a"}, {"1.md", "2.md"})  # the alias has not moved: the old one, whole
    new = put(made["b"], place)
    assert server.current(client) == f"ratchet-{new['version']}"
    assert seen(reader) == ({"b"}, {"1.md", "3.md"})
    assert [line["event"] for line in versions(place)] == ["publish", "publish"]


@pytest.mark.parametrize("place", ["server"], indirect=True)
def test_collected_versions_leave_the_server_too(place: Settings, made: dict[str, Path]) -> None:
    lines = [put(made[tag], place) for tag in "abc"]
    client = server.connect(place)

    def collections() -> set[str]:
        return {item.name for item in client.get_collections().collections}

    assert collections() == {f"ratchet-{line['version']}" for line in lines}
    assert collect(place, keep=1) == [lines[0]["version"]]
    assert collections() == {f"ratchet-{line['version']}" for line in lines[1:]}
    client.delete_collection(f"ratchet-{lines[1]['version']}")
    rollback(place)  # what the server lost is brought again
    assert server.current(client) == f"ratchet-{lines[1]['version']}"
