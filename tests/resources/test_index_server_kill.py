"""SIGKILL while an index travels to a Qdrant server: publishing in a process of its own, over HTTP.

The server is qdrant-client's local mode behind the REST calls that publishing makes. It outlives
its client, and may still take in what was sent before the death, as a real one does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from contracts.settings import ROOT
from resources.index import server
from resources.index.manifest import read_manifest
from tests.resources.indexes import make_index, policy_for

PUBLISH = """
import sys
from pathlib import Path
from contracts.settings import Settings
from resources import published
from resources.index import server
server.BATCH = 7
index, report, metric = sys.argv[1:]
policy = published.Policy(
    min_recall=0.9, report=Path(report), metric=metric, min_golden=0.6, keep=3
)
published.publish(Path(index), Settings.from_env(), policy)
"""


class Qdrant(ThreadingHTTPServer):
    """The REST calls of ``resources.index.server``, each answered by the local mode."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.real, self.lock = QdrantClient(":memory:"), threading.Lock()  # it knows no threads
        self.sent: list[int] = []  # ids of points, in the order of their coming
        self.upserts, self.open = 0, set[Any]()  # connections
        self.hold_at, self.holding, self.go_on = 0, threading.Event(), threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.open.discard(request)

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """The ``result`` of one call. Raises ValueError for what is not there."""
        match [method, *path.strip("/").split("/")]:
            case ["GET", "aliases"]:
                return self.real.get_aliases().model_dump(mode="json")
            case ["POST", "collections", "aliases"]:
                steps = models.ChangeAliasesOperation.model_validate(body).actions
                return self.real.update_collection_aliases(steps)
            case ["GET", "collections", name]:
                return self.real.get_collection(name).model_dump(mode="json")
            case ["PUT", "collections", name]:
                made = models.CreateCollection.model_validate(body)
                return self.real.create_collection(
                    name, vectors_config=made.vectors, sparse_vectors_config=made.sparse_vectors
                )
            case ["PATCH", "collections", name]:
                return self.real.update_collection(name, metadata=body["metadata"])
            case ["PUT", "collections", _, "index"]:
                return {"operation_id": 0, "status": "completed"}
            case ["PUT", "collections", name, "points"]:
                return self.upsert(name, models.PointsList.model_validate(body).points)
            case ["POST", "collections", name, "points", "count"]:
                return {"count": self.real.count(name).count}
            case ["POST", "collections", name, "points", "scroll"]:
                found, offset = self.real.scroll(
                    name, limit=body["limit"], offset=body.get("offset"), with_payload=False
                )
                points = [point.model_dump(mode="json") for point in found]
                return {"points": points, "next_page_offset": offset}
        raise AssertionError(f"publishing calls {method} {path}, which this server does not know")

    def upsert(self, name: str, points: list[Any]) -> dict[str, Any]:
        self.upserts += 1
        if self.upserts == self.hold_at:
            self.holding.set()
            assert self.go_on.wait(60)
        self.sent += [point.id for point in points]
        self.real.upsert(name, points)
        return {"operation_id": 0, "status": "completed"}


class Handler(BaseHTTPRequestHandler):
    server: Qdrant
    protocol_version = "HTTP/1.1"

    def reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, status = self.path.partition("?")[0], 200
        answer: dict[str, Any] = {"title": "qdrant", "version": "1.16.0"}  # to GET /
        if path != "/":
            try:
                with self.server.lock:
                    result = self.server.answer(self.command, path, json.loads(body or "{}"))
                answer = {"result": result, "status": "ok", "time": 0.0}
            except ValueError as error:
                status, answer = 404, {"status": {"error": str(error)}}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_PATCH = reply

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def qdrant() -> Iterator[Qdrant]:
    made = Qdrant()
    made.handle_error = lambda *_: None  # type: ignore[method-assign]  # its client is dead
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.go_on.set()
    made.shutdown()
    thread.join()
    made.server_close()


def publish(index: Path, root: Path, url: str) -> subprocess.Popen[bytes]:
    policy = policy_for(index)
    command = [sys.executable, "-c", PUBLISH, str(index), str(policy.report), policy.metric]
    environ = {**os.environ, "RATCHET_ROOT": str(root), "QDRANT_URL": url}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow  # three publishing processes: 2 CPU seconds each
def test_a_killed_upload_leaves_the_old_index_published_and_is_completed(
    qdrant: Qdrant, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{qdrant.server_address[1]}"
    old = make_index(tmp_path / "old", ["a.md", "b.md"])
    new = make_index(tmp_path / "new", [f"d{n:02}.md" for n in range(30)])
    first, second = (server.collection_of(read_manifest(path)["content"]) for path in (old, new))
    held = qdrant.real
    finished(publish(old, tmp_path, url))
    assert server.current(held) == first and server.is_whole(held, first)

    qdrant.hold_at, qdrant.sent = qdrant.upserts + 4, []
    process = publish(new, tmp_path, url)
    until(lambda: qdrant.holding.is_set() or process.poll() is not None)
    process.kill()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -9, errors.decode()
    qdrant.go_on.set()
    until(lambda: not qdrant.open)  # what was on its way has arrived
    arrived = list(qdrant.sent)
    assert 28 <= len(arrived) < 60, "killed in the middle"
    assert server.current(held) == first and server.is_whole(held, first)
    assert not server.is_whole(held, second)

    qdrant.sent = []
    finished(publish(new, tmp_path, url))
    assert sorted(arrived + qdrant.sent) == list(range(60)), "nothing twice, nothing left out"
    assert server.current(held) == second and server.is_whole(held, second)
    assert held.count(second, exact=True).count == 60
    assert held.count(first, exact=True).count == 4
