"""Embeddings of a server: checked, retried within a deadline, cached under the model's name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from contracts.errors import ConfigError, ServiceError
from contracts.params import Vectors
from contracts.settings import Settings
from resources import remote_embedding
from resources.embedding import Embedder, find_model, open_embedder, token_counter
from resources.remote_embedding import RemoteEmbedder, excerpt, retry_after
from serving.engines.launch import Launch
from stages import vectors
from tests.conftest import free_port
from tests.stages.knowledge import params, paths, write_chunks

Answer = Callable[["Server", dict[str, Any]], tuple[int, Any, dict[str, str]]]
DIMENSION = 4


def vector(text: str) -> list[float]:
    """Not of length 1, and different for different texts."""
    return [float(len(text)), float(sum(map(ord, text)) % 101), 1.0, -2.0]


def good(server: Server, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    items = [{"index": n, "embedding": vector(text)} for n, text in enumerate(body["input"])]
    return 200, {"object": "list", "data": items[::-1]}, {}  # the order is the index's to say


class Server:
    """A small embedding server. ``answers`` are used up one a request; then it is good."""

    def __init__(self) -> None:
        self.answers: list[Answer | str] = []
        self.requests: list[tuple[float, str, str | None, dict[str, Any]]] = []
        self.done = threading.Event()
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def texts(self) -> list[str]:
        return [text for *_, body in self.requests for text in body["input"]]


class _Handler(BaseHTTPRequestHandler):
    server_of_test: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server_of_test
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        server.requests.append((time.monotonic(), self.path, key, body))
        answer = server.answers.pop(0) if server.answers else good
        if answer == "drop":
            self.close_connection = True
            return
        if answer == "hang":
            server.done.wait(20)
            return
        if answer == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not server.done.wait(0.02):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
            return
        assert callable(answer)
        status, value, headers = answer(server, body)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: pytest shows what a test prints."""


def says(status: int, value: Any = "", **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda server, body: (status, value, named)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.done.set()
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_embedding, "FIRST_PAUSE", 0.02)


def embedder(server: Server, **options: Any) -> RemoteEmbedder:
    options = {"batch": 3, "timeout": 5.0, "deadline": 10.0, **options}
    folder = find_model("all-MiniLM-L6-v2")
    return RemoteEmbedder("some-model", DIMENSION, server.url, folder, **options)


def expected(texts: list[str]) -> np.ndarray:
    rows = np.array([vector(text) for text in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


TEXTS = [f"text number {number} " + "x" * number for number in range(10)]


def test_every_text_gets_its_own_vector_of_length_one(server: Server) -> None:
    made = embedder(server, key="secret")
    vectors = made.embed([*TEXTS, TEXTS[0]])
    assert vectors.shape == (11, DIMENSION) and vectors.dtype == np.float32
    assert np.allclose(vectors, expected([*TEXTS, TEXTS[0]]), atol=1e-7)
    assert len(server.requests) == 4 and sorted(server.texts) == sorted(TEXTS)
    for _, path, key, body in server.requests:
        assert (path, key) == ("/v1/embeddings", "Bearer secret")
        assert body["model"] == "some-model" and body["encoding_format"] == "float"
    assert made.embed([]).shape == made.embed_questions([]).shape == (0, DIMENSION)


def test_questions_go_to_the_same_model_uncached(server: Server, tmp_path: Path) -> None:
    made = embedder(server, cache_dir=tmp_path)
    assert (made.embed_questions(TEXTS) == made.embed(TEXTS)).all()
    server.answers = [says(503)]
    made.embed_questions(TEXTS[:2])
    sent = [len(body["input"]) for *_, body in server.requests]
    # Batches of one call travel at once, in any order.
    assert (sorted(sent[:4]), sorted(sent[4:8]), sent[8:]) == ([1, 3, 3, 3], [1, 3, 3, 3], [2, 2])
    assert server.requests[0][2] is None


def test_a_text_is_cut_where_the_model_stops_reading(server: Server) -> None:
    embedder(server).embed_questions(["word " * 254 + "tail", "word " * 250])
    assert server.texts == [("word " * 254).rstrip(), "word " * 250]


def test_an_address_may_end_in_v1(server: Server) -> None:
    server.url += "/v1/"
    embedder(server).warm()
    assert server.requests[0][1] == "/v1/embeddings"


def test_the_cache_is_named_by_model_and_dimension_not_by_address(
    server: Server, tmp_path: Path
) -> None:
    first = embedder(server, cache_dir=tmp_path)
    vectors = first.embed(TEXTS)
    elsewhere = Server()
    moved = embedder(elsewhere, cache_dir=tmp_path)
    assert (moved.embed(TEXTS) == vectors).all() and not elsewhere.requests
    assert (moved.cached, moved.computed) == (10, 0)
    folder = find_model("all-MiniLM-L6-v2")
    other = RemoteEmbedder("other-model", DIMENSION, elsewhere.url, folder, cache_dir=tmp_path)
    other.embed(TEXTS[:3])
    assert other.computed == 3 and len(list(tmp_path.glob("*.sqlite"))) == 2
    wider = RemoteEmbedder("some-model", 8, elsewhere.url, folder)
    assert len({first.digest, other.digest, wider.digest}) == 3
    assert first.describe()["dimension"] == DIMENSION and first.max_tokens == 254
    elsewhere.http.shutdown()
    elsewhere.http.server_close()


@pytest.mark.parametrize(
    "fault",
    [says(429), says(500, b"oops"), says(503), says(408), "drop"],
    ids=["429", "500", "503", "408", "drop"],
)
def test_what_passes_is_tried_again(server: Server, fault: Answer | str) -> None:
    server.answers = [fault, fault]
    assert np.allclose(embedder(server).embed(TEXTS[:2]), expected(TEXTS[:2]))
    assert len(server.requests) == 3


def test_a_server_that_hangs_is_asked_again(server: Server) -> None:
    server.answers = ["hang"]
    assert np.allclose(embedder(server, timeout=0.2).embed(TEXTS[:2]), expected(TEXTS[:2]))
    assert len(server.requests) == 2


def test_retry_after_is_kept_to(server: Server) -> None:
    server.answers = [says(429, Retry_After="1")]
    embedder(server).embed(TEXTS[:1])
    assert 1.0 <= server.requests[1][0] - server.requests[0][0] < 2.5


@pytest.mark.parametrize("fault", [says(503, b"busy"), "hang", "drip", says(429, Retry_After="9")])
def test_the_deadline_ends_it(server: Server, fault: Answer | str) -> None:
    server.answers = [fault] * 100
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"asked \d+ times and gave no vectors") as caught:
        embedder(server, deadline=0.4, timeout=0.3).embed(TEXTS[:1])
    assert time.monotonic() - started < 2
    assert caught.value.where == f"{server.url}/v1/embeddings"
    assert "run the stage again" in str(caught.value)


def test_an_address_where_nobody_listens() -> None:
    folder = find_model("all-MiniLM-L6-v2")
    made = RemoteEmbedder("m", 4, f"http://127.0.0.1:{free_port()}", folder, deadline=0.3)
    with pytest.raises(ServiceError, match="NewConnectionError"):
        made.embed(["a"])


def spoilt(change: Callable[[list[dict[str, Any]]], Any]) -> Answer:
    """A good answer whose list of vectors was changed."""

    def answer(server: Server, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        _, value, headers = good(server, body)
        items = value["data"]
        return 200, {"data": change(items) or items}, headers

    return answer


def put(value: Any) -> Answer:
    return spoilt(lambda items: items[0].update(embedding=value))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (says(200, b"<html>a login page</html>"), "no list of vectors.*login page"),
        (says(200, {"error": "no"}), "no list of vectors"),
        (says(200, {"data": [7]}), "no list of vectors"),
        (spoilt(lambda items: items[1:]), "given 3 texts and returned 2 vectors"),
        (spoilt(lambda items: [items[0], *items]), "returned 4 vectors"),
        (spoilt(lambda items: items[0].update(index=1)), r"places \[0, 1, 1\]"),
        (put([1.0, 2.0]), "have 2 numbers; vectors.dimension is 4"),
        (put([]), "have 0 numbers"),
        (put([1.0, float("nan"), 0.0, 0.0]), "1 of 3 vectors that are not finite"),
        (put([1.0, float("inf"), 0.0, 0.0]), "not finite"),
        (put([0.0] * 4), "all zero"),
        (put(["a"] * 4), "no list of vectors"),
        (says(400, b'{"error": "input is too long"}'), "refuses.*400.*too long"),
        (says(401, b"who?"), "EMBEDDINGS_API_KEY"),
        (says(404, b"no such model"), "correct EMBEDDINGS_URL"),
        (says(307, Location="http://elsewhere.invalid/"), "answered 307"),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(
    server: Server, tmp_path: Path, answer: Answer, message: str
) -> None:
    server.answers = [answer]
    made = embedder(server, cache_dir=tmp_path)
    with pytest.raises(ServiceError, match=r"(?s)" + message):
        made.embed(TEXTS[:3])
    assert len(server.requests) == 1
    assert made.cache is not None and len(made.cache) == 0, "nothing wrong may be cached"


def test_what_came_before_a_failure_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    made = embedder(server, cache_dir=tmp_path)
    made.embed(TEXTS[4:])
    server.answers = [says(400)]
    with pytest.raises(ServiceError):
        made.embed(TEXTS[:6])
    server.requests.clear()
    assert np.allclose(made.embed(TEXTS), expected(TEXTS))
    assert set(server.texts) <= set(TEXTS[:4])


def test_params_open_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"model": "some-model", "batch": 5, "dtype": "float32", "backend": "openai"}
    vectors = Vectors.model_validate({**block, "dimension": DIMENSION})
    monkeypatch.delenv("EMBEDDINGS_URL", raising=False)
    with pytest.raises(ConfigError, match="EMBEDDINGS_URL"):
        open_embedder(vectors, None)
    monkeypatch.setenv("EMBEDDINGS_URL", server.url)
    monkeypatch.setenv("EMBEDDINGS_API_KEY", "secret")
    made = open_embedder(vectors, None)
    assert isinstance(made, RemoteEmbedder)
    assert np.allclose(made.embed(TEXTS), expected(TEXTS))
    assert server.requests[0][2] == "Bearer secret"
    assert len(token_counter(vectors).encode("one two", add_special_tokens=False).ids) == 2
    named = vectors.model_copy(update={"tokenizer": "/no/such/folder"})
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        token_counter(named)


def test_retry_after_and_excerpts() -> None:
    assert retry_after("3") == 3.0
    assert retry_after(None) is retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert excerpt(b"a\n\n  b" + b"\xff" * 9, 4) == "a b\N{REPLACEMENT CHARACTER}"
    assert excerpt(b" \n") == "(empty)"


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[str]:
    """vLLM on this machine's CPU with all-MiniLM-L6-v2: up in 44 s, 2.3 GB in three processes."""
    args = {"runner": "pooling", "dtype": "float32", "max-num-seqs": 16}
    memory = {"gpu-memory-utilization": 0.1, "kv-cache-memory-bytes": 64 << 20}
    engine = Launch(find_model("all-MiniLM-L6-v2"), "minilm", {**args, **memory})
    port, log = free_port(), tmp_path / "vllm.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            engine.argv("127.0.0.1", port),
            env=engine.environ(os.environ),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        pool = urllib3.PoolManager(retries=False)
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if pool.request("GET", f"http://127.0.0.1:{port}/health").status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_real_server_gives_the_vectors_that_we_compute(
    vllm: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDDINGS_URL", vllm)
    source, far, near = (tmp_path / f"{name}.parquet" for name in ("chunks", "far", "near"))
    write_chunks(tmp_path)
    remote = {"model": "minilm", "backend": "openai", "dimension": 384, "batch": 4}
    vectors.run(paths(chunks=source, out=far), params(vectors=remote))
    vectors.run(paths(chunks=source, out=near), params(vectors={"dtype": "float32"}))
    ids, theirs, model = vectors.read_vectors(far)
    same_ids, ours, _ = vectors.read_vectors(near)
    assert ids == same_ids and (theirs * ours).sum(axis=1).min() >= 0.999
    assert (model["name"], model["dimension"]) == ("minilm", 384)
    made = open_embedder(params(vectors=remote).vectors, settings.embeddings_dir)
    long = "a question that goes on and on " * 60
    asked = made.embed_questions([long, "How long does a rollback take?"])
    own = Embedder(dtype="float32", threads=1).embed_questions(
        [long, "How long does a rollback take?"]
    )
    assert (asked * own).sum(axis=1).min() >= 0.999
    assert vectors.run(paths(chunks=source, out=tmp_path / "again"), params(vectors=remote))
    assert (tmp_path / "again").read_bytes() == far.read_bytes()
