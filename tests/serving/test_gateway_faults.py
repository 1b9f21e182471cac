"""What goes wrong behind and in front of the gateway, and what everybody is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from contracts.settings import Settings
from resources import requests as request_log
from serving.gateway.config import GatewayConfig, Requests
from tests.conftest import free_port
from tests.serving.conftest import Running, events, until
from tests.serving.factory import point
from tests.serving.fake_engine import FakeEngine

BEFORE = {
    "503": (503, "engine_overloaded"),
    "500": (502, "engine_error"),
    "html": (502, "engine_error"),
    "context": (400, "context_length_exceeded"),
    "error-first": (502, "engine_error"),
    "hang": (504, "engine_timeout"),
}
MIDDLE = {
    "error-mid": "engine_error",
    "overloaded-mid": "engine_overloaded",
    "stall-mid": "engine_timeout",
    "reset-mid": "engine_disconnected",
    "eof": "engine_disconnected",
    "garbage": "engine_malformed_stream",
    "endless": "engine_malformed_stream",
}


def record_of(gateway: Running, response: Any) -> Any:
    name = response.headers["x-ratchet-response-id"]
    return until(lambda: request_log.find(gateway.settings, name))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE)
def test_a_fault_before_the_first_byte_has_its_status(
    gateway: Running, fault: str, stream: bool
) -> None:
    status, code = BEFORE[fault]
    response = gateway.ask(f"fault:{fault}", stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["request_id"] == response.headers["x-request-id"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert "secret traceback" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    record = record_of(gateway, response)
    assert (record.status, record.error, record.answer) == (status, code, "")
    if code.startswith("engine_"):
        assert gateway.metric("ratchet_gateway_engine_errors_total", code=code) >= 1


@pytest.mark.parametrize("fault", MIDDLE)
def test_a_stream_that_breaks_says_so_once_and_invents_nothing(
    gateway: Running, engine: FakeEngine, fault: str
) -> None:
    engine.pause = 0.005  # else an error may come together with the first byte
    response = gateway.ask(f"fault:{fault}", stream=True)
    found = events(response)
    assert response.status_code == 200  # the headers were gone already
    *chunks, last = found
    assert last["error"]["code"] == MIDDLE[fault]
    assert "[DONE]" not in response.text
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
    record = record_of(gateway, response)
    assert record.answer == "Fact 1 " and record.error == MIDDLE[fault] and record.status >= 500


@pytest.mark.parametrize("fault", MIDDLE)
def test_an_answer_that_breaks_is_no_answer(gateway: Running, fault: str) -> None:
    response = gateway.ask(f"fault:{fault}")
    assert response.status_code >= 500
    assert response.json()["error"]["code"] == MIDDLE[fault]


def test_a_dead_engine_is_told_and_seen(
    settings: Settings, release: str, start: Callable[..., Running]
) -> None:
    with FakeEngine() as engine:
        point(settings, release, engine.url)
        gateway = start().ready()
    response = gateway.ask("x")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_unreachable")
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    assert "health check" in gateway.client.get("/readyz").json()["problem"]
    assert gateway.client.get("/healthz").status_code == 200
    assert gateway.metric("ratchet_gateway_ready") == 0


def test_readiness_means_tokens(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    own_engine.tokens = 0
    point(settings, release, own_engine.url)
    gateway = start()
    until(lambda: "no token" in (gateway.client.get("/readyz").json()["problem"] or ""))
    assert gateway.client.get("/readyz").status_code == 503
    own_engine.tokens = 1
    gateway.ready()


def test_without_a_deployment_nothing_is_guessed(start: Callable[..., Running]) -> None:
    gateway = start()
    response = gateway.ask("x")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "not_ready")
    assert "nothing is deployed" in error["message"]
    assert gateway.client.get("/readyz").status_code == 503
    assert gateway.client.get("/v1/models").json()["data"] == []


def test_a_closed_pooled_connection_is_not_an_error(
    settings: Settings, release: str, start: Callable[..., Running]
) -> None:
    """An engine may close an idle connection at the moment when we reuse it."""
    port = free_port()
    listener = socket.create_server(("127.0.0.1", port))
    point(settings, release, f"http://127.0.0.1:{port}")
    posts: list[bytes] = []
    answer = (
        b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
        b"data: [DONE]\n\n"
    )

    def serve() -> None:
        while len(posts) < 2:
            connection, _ = listener.accept()
            with connection:
                head = connection.recv(65536)
                if head.startswith(b"POST"):
                    posts.append(head)
                if len(posts) == 2:
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: "
                        + str(len(answer)).encode()
                        + b"\r\n\r\n"
                        + answer
                    )  # else: closed without a byte

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    response = start(health_every=60).ask("x")
    thread.join(5)
    listener.close()
    assert (response.status_code, len(posts)) == (200, 2), response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["hang", "stall-mid"])
def test_a_client_that_leaves_ends_the_engines_work(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running],
    fault: str, stream: bool,
) -> None:  # fmt: skip
    point(settings, release, own_engine.url)
    gateway = start(config=GatewayConfig()).ready()
    body = {"model": "stable", "stream": stream,
            "messages": [{"role": "user", "content": f"fault:{fault}"}]}  # fmt: skip
    data = json.dumps(body).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data
    )
    until(lambda: own_engine.open == 1)
    client.close()
    until(lambda: own_engine.open == 0, 2)
    until(lambda: gateway.metric("ratchet_gateway_in_flight") == 0)
    labels = {"code": "client_disconnected", "status": "499", "stream": str(stream).lower()}
    assert gateway.metric("ratchet_gateway_requests_total", **labels) == 1


def test_a_client_that_does_not_read_is_given_up(
    settings: Settings, release: str, start: Callable[..., Running]
) -> None:
    with FakeEngine(answer="word " * 60_000) as engine:
        point(settings, release, engine.url)
        gateway = start(config=GatewayConfig(requests=Requests(write_seconds=0.3))).ready()
        body = {"model": "stable", "stream": True,
                "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
        data = json.dumps(body).encode()
        host, port = gateway.url.removeprefix("http://").split(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data
        )
        until(lambda: engine.open == 1)
        until(lambda: gateway.metric("ratchet_gateway_in_flight") == 0)
        until(lambda: engine.open == 0)
        client.close()


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b'{"model": "stable", "messages": [}', "invalid_json", None),
        (b'{"model": "stable", "model": "other"}', "invalid_json", None),
        (b'{"model": "stable", "temperature": NaN}', "invalid_json", None),
        (b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
        (b'{"model": ' + b"[" * 40 + b"]" * 40 + b"}", "invalid_json", None),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"messages": []}', "invalid_request", "model"),
        (b'{"model": "stable"}', "invalid_request", "messages"),
        (b'{"model": "stable", "messages": [{"role": "king", "content": "x"}]}',
         "invalid_request", "messages[0].role"),
        (b'{"model": "stable", "messages": [{"role": "user", "content": 7}]}',
         "invalid_request", "messages[0].content"),
        (b'{"model": "stable", "messages": [{"role": "user", "content": "  "}]}',
         "invalid_request", "messages[0].content"),
        (b'{"model": "stable", "messages": [{"role": "user", "content": "\\ud800"}]}',
         "invalid_request", "messages[0].content"),
        (b'{"model": "stable", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
         "invalid_request", "messages[0].content"),
        (b'{"model": "stable", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
         "unsupported_parameter", "messages[0].content"),
    ],
)  # fmt: skip
def test_a_bad_body_is_400_and_names_the_field(
    gateway: Running, engine: FakeEngine, body: bytes, code: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = gateway.client.post("/v1/chat/completions", content=body, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert engine.bodies == []
    assert record_of(gateway, response).status == 400


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("temperature", 3, "invalid_request"), ("temperature", True, "invalid_request"),
        ("temperature", "0", "invalid_request"), ("top_p", 0, "invalid_request"),
        ("max_tokens", 0, "invalid_request"), ("max_tokens", True, "invalid_request"),
        ("max_completion_tokens", 1.5, "invalid_request"), ("seed", 1 << 63, "invalid_request"),
        ("stop", ["a"] * 5, "invalid_request"), ("stop", [""], "invalid_request"),
        ("stream", "yes", "invalid_request"), ("stream_options", [], "invalid_request"),
        ("n", 2, "unsupported_parameter"), ("n", True, "unsupported_parameter"),
        ("tools", [{}], "unsupported_parameter"), ("logprobs", True, "unsupported_parameter"),
        ("response_format", {"type": "json_object"}, "unsupported_parameter"),
    ],
)  # fmt: skip
def test_parameters_are_strict(gateway: Running, name: str, value: Any, code: str) -> None:
    error = gateway.ask("x", **{name: value}).json()["error"]
    assert (error["code"], error["param"]) == (code, name)


def test_harmless_values_of_unsupported_parameters_pass(gateway: Running) -> None:
    response = gateway.ask(
        "x", n=1, tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False,
        logit_bias=None, modalities=["text"],
    )  # fmt: skip
    assert response.status_code == 200


def test_other_models_and_paths_are_404(gateway: Running) -> None:
    response = gateway.ask("x", model="nano")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    for path in ("/", "/v1/load_lora_adapter", "/pause", "/v1/../health"):
        response = gateway.client.post(path, json={})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), path
    response = gateway.client.get("/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_bodies_have_a_bound(settings: Settings, start: Callable[..., Running]) -> None:
    gateway = start(config=GatewayConfig(requests=Requests(body_bytes=1000)))
    declared = gateway.ask("x" * 2000)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "body_too_large")
    pieces = (b" " * 400 for _ in range(5))
    headers = {"content-type": "application/json"}
    undeclared = gateway.client.post("/v1/chat/completions", content=pieces, headers=headers)
    assert undeclared.status_code == 413
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ):
        response = gateway.client.post("/v1/chat/completions", content=b"{}", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (
            415, "unsupported_media_type")  # fmt: skip


def test_a_long_question_is_refused_and_not_cut(gateway: Running, engine: FakeEngine) -> None:
    response = gateway.ask("x" * 20_001)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert engine.bodies == []


def test_more_than_the_limit_in_flight_is_told_to_come_again(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    gateway = start(config=GatewayConfig(requests=Requests(in_flight=1))).ready()
    thread = threading.Thread(target=gateway.ask, args=("fault:slow",))
    thread.start()
    until(lambda: own_engine.open == 1)
    response = gateway.ask("x")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "1"
    thread.join()


def test_a_bug_is_500_without_the_questions_words(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    point(settings, release, own_engine.url)
    gateway = start().ready()
    live = gateway.gateway.live.current
    assert live is not None

    def broken(questions: list[str]) -> None:
        raise ZeroDivisionError(f"retrieval of {questions}")

    live.rag.retrieve_many = broken  # type: ignore[method-assign, assignment]
    response = gateway.ask("my canary is 8f3a")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "8f3a" not in caplog.text and "8f3a" not in response.text
