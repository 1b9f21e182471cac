"""Uploading to a Qdrant server: resumed, bounded, patient, and never half-published."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from contracts.errors import InputError, ServiceError
from contracts.settings import Settings
from resources.index import open_index, server
from tests.resources.indexes import make_index


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    found: list[float] = []
    monkeypatch.setattr(server.time, "sleep", found.append)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"d{n:03}.md" for n in range(30)]
    return make_index(tmp_path_factory.mktemp("server") / "index", names)


class Client:
    """qdrant-client's local mode, with something done around every upsert."""

    def __init__(self, around: Callable[[int], None] = lambda number: None) -> None:
        self.real, self.around = QdrantClient(":memory:"), around
        self.batches: list[list[int]] = []
        self.lock = threading.Lock()  # the local mode knows no threads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def upsert(self, name: str, points: list[Any], wait: bool) -> None:
        with self.lock:
            self.batches.append([point.id for point in points])
            number = len(self.batches)
        self.around(number)
        with self.lock:
            self.real.upsert(name, points=points, wait=wait)


def status(code: int) -> UnexpectedResponse:
    return UnexpectedResponse(code, "", b"", httpx.Headers())


def test_an_upload_that_died_is_completed_and_nothing_is_sent_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BATCH", 7)
    monkeypatch.setattr(server, "IN_FLIGHT", 1)

    def die(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt

    client = Client(die)
    with open_index(folder) as index, pytest.raises(KeyboardInterrupt):
        server.upload(client, index)
    name = server.collection_of(index.manifest["content"])
    assert client.count(name).count == 21 and not server.is_whole(client, name)
    assert server.current(client) is None
    with pytest.raises(InputError, match="no whole index"):
        server.ServerIndex(client, name)
    client.around, client.batches = lambda number: None, []
    with open_index(folder) as index:
        assert server.upload(client, index) == name
        assert sorted(n for batch in client.batches for n in batch) == list(range(21, 60))
        client.batches = []
        assert server.upload(client, index) == name and client.batches == []  # whole: nothing to do
    assert server.ServerIndex(client, name).count == 60


def test_payload_indexes_are_completed_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, asked = Client(), []

    def index_field(name: str, field: str, schema: str) -> None:
        asked.append(field)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(client, "create_payload_index", index_field, raising=False)
    with open_index(folder) as index:
        with pytest.raises(KeyboardInterrupt):
            server.upload(client, index)
        asked += [""] * 3
        server.upload(client, index)
    assert asked[6:] == ["source", "path", "format", "language", "licence", "doc_id"]


def test_a_collection_that_is_there_already_is_filled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    """The server made it, yet its answer got lost: the second try is told 409."""
    client = Client()
    create, tries = client.real.create_collection, iter([status(503), status(409)])

    def lossy(*args: Any, **named: Any) -> None:
        error = next(tries)
        if error.status_code == 503:
            create(*args, **named)
        raise error

    monkeypatch.setattr(client, "create_collection", lossy, raising=False)
    with open_index(folder) as index:
        assert server.is_whole(client, server.upload(client, index))


def test_no_more_batches_are_in_flight_than_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BATCH", 2)
    now, most, full = 0, 0, threading.Event()
    lock = threading.Lock()

    def count(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == server.IN_FLIGHT:
                full.set()
        full.wait(20)  # until as many as may are in flight
        with lock:
            now -= 1

    client = Client(count)
    with open_index(folder) as index:
        read = 0
        points = index.points

        def counted(step: int) -> Any:
            nonlocal read
            for batch in points(step):
                read += 1
                assert read <= len(client.batches) + server.IN_FLIGHT + 1  # not read ahead
                yield batch

        monkeypatch.setattr(index, "points", counted)
        server.upload(client, index)
    assert most == server.IN_FLIGHT and len(client.batches) == 30


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (status(429), 0.2),
        (status(503), 0.2),
        (ResponseHandlingException(httpx.ConnectError("refused")), 0.2),
        (ResourceExhaustedResponse("slow down", 3), 3.0),
    ],
)
def test_errors_that_pass_are_waited_out(
    folder: Path, pauses: list[float], error: Exception, first: float
) -> None:
    def twice(number: int) -> None:
        if number <= 2:
            raise error

    client = Client(twice)
    with open_index(folder) as index:
        assert server.is_whole(client, server.upload(client, index))
    assert pauses[0] == first and len(pauses) == 2 and pauses[1] >= first
    assert client.batches == [list(range(60))] * 3


def test_a_server_that_stays_away_is_said(folder: Path, pauses: list[float]) -> None:
    def never(_: int) -> None:
        raise status(503)

    client = Client(never)
    with open_index(folder) as index, pytest.raises(ServiceError, match="did not answer 8 times"):
        server.upload(client, index)
    assert pauses == [0.2 * 2**n for n in range(7)]
    assert server.current(client) is None


def test_errors_that_stay_are_not_tried_again(folder: Path, pauses: list[float]) -> None:
    def refuse(_: int) -> None:
        raise status(403)

    client = Client(refuse)
    with open_index(folder) as index, pytest.raises(UnexpectedResponse):
        server.upload(client, index)
    assert pauses == [] and len(client.batches) == 1


def test_points_that_got_lost_keep_the_alias_where_it_is(folder: Path) -> None:
    client = Client()
    with open_index(folder) as index:
        name = server.collection_of(index.manifest["content"])
        server._create(client, name, index.manifest)
        client.real.upsert(name, points=[_stray()], wait=True)
        with pytest.raises(ServiceError, match="holds 61 points, the index 60"):
            server.upload(client, index)
    assert not server.is_whole(client, name)


def _stray() -> Any:
    from qdrant_client import models

    return models.PointStruct(id=10_000, vector={server.DENSE: [1.0] + [0.0] * 7}, payload={})


def test_the_alias_moves_and_the_published_collection_is_never_dropped(
    folder: Path, tmp_path: Path
) -> None:
    client = Client()
    names = []
    for path in (folder, make_index(tmp_path / "other", ["x.md"])):
        with open_index(path) as index:
            names.append(server.upload(client, index))
        server.promote(client, names[-1], ["docs:gone.md"])
        assert server.current(client) == names[-1]
    described = server.describe(client, server.ALIAS)
    assert described is not None and described["tombstones"] == ["docs:gone.md"]
    server.promote(client, names[-1], [])
    assert (server.describe(client, server.ALIAS) or {})["tombstones"] == []
    server.drop(client, names[1])
    server.drop(client, names[0])
    server.drop(client, names[0])
    assert [item.name for item in client.get_collections().collections] == [names[1]]


def test_address_and_key_come_from_the_environment(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {"RATCHET_ROOT": str(tmp_path), "QDRANT_URL": "http://127.0.0.1:1", "QDRANT_API_KEY": "k3y"}
    )
    assert "k3y" not in repr(settings)
    client = server.connect(settings)
    assert client._client._rest_headers["api-key"] == "k3y"
