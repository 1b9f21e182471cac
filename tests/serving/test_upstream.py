"""The upstream client against an engine that fails in every way we know of."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import aiohttp
import pytest

from serving.gateway import upstream
from serving.gateway.api_request import Kind
from serving.gateway.endpoint import Endpoint, Timeouts
from serving.gateway.upstream import (
    UpstreamClient,
    UpstreamResponse,
    outgoing,
)
from serving.gateway.upstream_errors import UpstreamError, retry_after
from tests.conftest import free_port
from tests.serving.conftest import until
from tests.serving.fake_engine import ANSWER, FakeEngine

#: For faults that are waited for; all others may be slow on a busy machine.
QUICK = Timeouts(connect=1, first_byte=0.3, unstreamed=0.3, stall=0.3, whole=5)
PATIENT = Timeouts(connect=5, first_byte=10, unstreamed=10, stall=10, whole=20)
WAITED_FOR = {"hang", "hang-body", "drip", "stall-mid"}


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def fake(shared: FakeEngine) -> FakeEngine:
    shared.fault, shared.aborted = "", 0
    shared.bodies.clear()
    shared.headers.clear()
    shared.paths.clear()
    return shared


def endpoint(url: str, timeouts: Timeouts = PATIENT, fault: str = "", **more: Any) -> Endpoint:
    timeouts = QUICK if fault in WAITED_FOR else timeouts
    return Endpoint(provider="p", url=url, model="nano", timeouts=timeouts, **more)


def body(text: str = "hi", **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()


def run(use: Callable[[UpstreamClient], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        async with UpstreamClient() as client:
            return await use(client)

    return asyncio.run(main())


def ask(
    to: Endpoint, fault: str = "", stream: bool = True, kind: Kind = "chat", **more: Any
) -> tuple[bytes, UpstreamError | None, str, UpstreamResponse | None]:
    """The bytes, the error, what was reported, and the response."""
    text = f"fault:{fault}" if fault else "hi"
    data = {
        "chat": body(text, stream=stream),
        "completions": json.dumps({"prompt": text}).encode(),
        "embeddings": json.dumps({"input": text}).encode(),
    }[kind]

    async def use(client: UpstreamClient) -> Any:
        out, ended = b"", []
        try:
            response = await client.open(to, kind, data, {}, stream, **more)
        except UpstreamError as error:
            return out, error, "", None
        response.on_end = ended.append
        if not stream:
            response.done()
            return response.body, None, ended[0], response
        error = None
        try:
            async for piece in response.chunks():
                out += piece
        except UpstreamError as found:
            error = found
        response.close()
        assert len(ended) == 1
        return out, error, ended[0], response

    return run(use)  # type: ignore[no-any-return]


def raw(url: str, text: str) -> bytes:
    """The same answer without us."""

    async def get() -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", data=body(text, stream=True)) as response,
        ):
            return await response.read()

    return asyncio.run(get())


@pytest.mark.parametrize(
    "fault", ["", "crlf", "split", "comments", "multi-line", "giant", "no-usage"]
)
def test_streams_are_relayed_byte_for_byte(fake: FakeEngine, fault: str) -> None:
    text = f"fault:{fault}" if fault else "hi"
    out, error, ended, response = ask(endpoint(fake.url, fault=fault), fault, want_text=True)
    assert (error, ended) == (None, "ok")
    assert out == raw(fake.url, text)
    assert response is not None and response.scan.finish_reason == "stop"
    assert response.usage == (
        None if fault == "no-usage" else
        {"prompt_tokens": 20, "completion_tokens": 11, "total_tokens": 99}
    )  # fmt: skip
    assert response.scan.completion_tokens() == (
        (12, True) if fault == "no-usage" else (11, False)
    )  # 46 bytes of text: an estimate, and flagged
    assert "".join(response.scan.texts) == ANSWER


BEFORE = {
    "503": ("saturated", "engine_overloaded"),
    "429": ("saturated", "engine_overloaded"),
    "429-wait": ("saturated", "engine_overloaded"),
    "503-page": ("error", "engine_error"),
    "500": ("error", "engine_error"),
    "html": ("error", "engine_error"),
    "redirect": ("error", "engine_error"),
    "401": ("denied", "engine_error"),
    "404": ("denied", "engine_error"),
    "context": ("refused", "context_length_exceeded"),
    "reset-first": ("unreachable", "engine_unreachable"),
    "hang": ("timeout", "engine_timeout"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", BEFORE)
def test_what_fails_before_the_first_byte_has_its_code(
    fake: FakeEngine, fault: str, stream: bool
) -> None:
    _, error, _, _ = ask(endpoint(fake.url, fault=fault, dialect="vllm"), fault, stream)
    assert error is not None
    assert (error.outcome, error.code) == BEFORE[fault]
    assert error.counts == (error.outcome in {"error", "unreachable", "timeout"})
    assert error.elsewhere == (error.outcome != "refused")
    assert "sk-sec" not in error.message and "secret" not in error.message
    if error.code == "engine_overloaded":  # vLLM does not say when to come again
        assert error.all_headers() == {"retry-after": "1"}
        assert error.retry_after == (1.0 if fault == "429-wait" else None)
    until(lambda: fake.open == 0, 2)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("hang-body", "timeout"), ("drip", "timeout"), ("empty", "disconnected"),
     ("error-first", "error")],
)  # fmt: skip
def test_a_head_alone_is_no_first_byte(fake: FakeEngine, fault: str, outcome: str) -> None:
    _, error, _, response = ask(endpoint(fake.url, fault=fault), fault)
    assert response is None and error is not None and error.outcome == outcome
    until(lambda: fake.open == 0, 2)


MIDDLE = {
    "error-mid": "error",
    "overloaded-mid": "saturated",
    "stall-mid": "timeout",
    "reset-mid": "disconnected",
    "eof": "disconnected",
}


@pytest.mark.parametrize("fault", MIDDLE)
def test_a_stream_that_breaks_has_given_whole_events_and_no_end(
    fake: FakeEngine, fault: str
) -> None:
    fake.pause = 0.02  # what comes with the first event is not the middle yet
    try:
        out, error, ended, response = ask(endpoint(fake.url, fault=fault), fault)
    finally:
        fake.pause = 0.0
    assert error is not None and error.outcome == ended == MIDDLE[fault]
    found = [json.loads(part[6:]) for part in out.decode().split("\n\n") if part]
    assert [e["choices"][0]["delta"]["content"] for e in found] == ["", "Fact ", "1 "]
    assert b"[DONE]" not in out and b'"error"' not in out
    assert response is not None and response.scan.completion_tokens() == (2, True)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("error-200", "error"),
        ("html-200", "malformed"),
        ("cut", "disconnected"),
        ("stall-mid", "timeout"),
    ],
)
def test_a_200_is_not_an_answer(fake: FakeEngine, fault: str, outcome: str) -> None:
    _, error, _, _ = ask(endpoint(fake.url, fault=fault), fault, stream=False)
    assert error is not None and error.outcome == outcome


def test_an_endless_event_is_given_up(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.scan.MAX_UNENDED", 3 << 19)
    out, error, ended, _ = ask(endpoint(fake.url), "endless")
    assert error is not None and (error.outcome, ended) == ("malformed", "malformed")
    assert out.endswith(b"x\n\n")  # so that our own error event is an event


def test_an_answer_in_one_piece_may_not_be_endless(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "MAX_BODY", 10)
    _, error, _, _ = ask(endpoint(fake.url), stream=False)
    assert error is not None and error.outcome == "malformed"


def test_other_kinds_and_tools(fake: FakeEngine) -> None:
    for kind, path in (("completions", "/v1/completions"), ("embeddings", "/v1/embeddings")):
        out, error, ended, response = ask(endpoint(fake.url), stream=False, kind=kind)
        assert (error, ended, fake.paths[-1]) == (None, "ok", path)
        assert response is not None and response.usage is not None
        assert response.usage["prompt_tokens"] == 3 and json.loads(out)["id"] == "x-1"

    async def tools(client: UpstreamClient) -> bytes:
        data = body(tools=[{"type": "function", "function": {"name": "look"}}])
        async with await client.open(endpoint(fake.url), "chat", data, {}, False) as response:
            assert response.usage == {**(response.usage or {}), "prompt_tokens": 3}
            return response.body

    call = json.loads(run(tools))["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "look"


def test_a_stream_longer_than_allowed_ends(fake: FakeEngine) -> None:
    fake.pause = 0.05
    try:
        _, error, ended, _ = ask(endpoint(fake.url, Timeouts(stall=1, whole=0.2)))
    finally:
        fake.pause = 0.0
    assert error is not None and "did not end within" in error.message and ended == "timeout"


def test_a_slow_reader_is_no_stall(fake: FakeEngine) -> None:
    async def use(client: UpstreamClient) -> bytes:
        to = endpoint(fake.url, Timeouts(stall=0.05, whole=5))
        response = await client.open(to, "chat", body(stream=True), {}, True)
        out = b""
        async for piece in response.chunks():
            out += piece
            await asyncio.sleep(0.12)  # longer than the stall
        return out

    assert run(use).endswith(b"data: [DONE]\n\n")


def test_leaving_ends_the_engines_work(fake: FakeEngine) -> None:
    async def use(client: UpstreamClient) -> None:
        for text in ("fault:hang", "fault:stall-mid"):
            to = endpoint(fake.url, Timeouts(first_byte=60, stall=60))
            call = asyncio.ensure_future(_read_all(client, to, text))
            while fake.open == 0:
                await asyncio.sleep(0.005)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.to_thread(until, lambda: fake.open == 0, 2)

    async def _read_all(client: UpstreamClient, to: Endpoint, text: str) -> None:
        response = await client.open(to, "chat", body(text, stream=True), {}, True)
        async with response:
            async for _ in response.chunks():
                pass

    run(use)
    assert fake.aborted == 2


def test_connections_are_used_again(fake: FakeEngine) -> None:
    async def use(client: UpstreamClient) -> int:
        for stream in (True, False, True, True):
            async with await client.open(
                endpoint(fake.url), "chat", body(stream=stream), {}, stream
            ) as response:
                async for _ in _pieces(response, stream):
                    pass
        return client.http.opened

    async def _pieces(response: UpstreamResponse, stream: bool) -> AsyncIterator[bytes]:
        if stream:
            async for piece in response.chunks():
                yield piece

    assert run(use) == 1


def test_what_a_client_sent_stays_here(fake: FakeEngine) -> None:
    sent = {
        "authorization": "Bearer rk-client", "cookie": "a=b", "connection": "keep-alive, x-evil",
        "transfer-encoding": "chunked", "te": "trailers", "upgrade": "h2c", "host": "evil",
        "x-user-id": "root", "x-forwarded-for": "1.2.3.4", "x-request-id": "req-ours",
        "x-real-ip": "::1", "forwarded": "for=x", "proxy-authorization": "x",
        "openai-organization": "x",
        "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    }  # fmt: skip
    assert outgoing(sent, 7).splitlines() == [
        b"content-length: 7",
        b"traceparent: " + sent["traceparent"].encode(),
        b"x-request-id: req-ours",
        b"",
    ]

    async def use(client: UpstreamClient) -> None:
        to = endpoint(fake.url, api_key="sk-provider")
        assert "sk-provider" not in repr(to)
        (await client.open(to, "chat", body(stream=True), sent, True)).close()

    run(use)
    got = {name.lower(): value for name, value in fake.headers[0].items()}
    assert got["authorization"] == "Bearer sk-provider"
    assert set(got) <= {
        "host", "authorization", "x-request-id", "traceparent", "content-type", "content-length",
        "accept", "accept-encoding", "user-agent",
    }  # fmt: skip


def test_nobody_there() -> None:
    _, error, _, _ = ask(endpoint(f"http://127.0.0.1:{free_port()}"))
    assert error is not None and (error.outcome, error.counts) == ("unreachable", True)


def test_a_connection_that_is_never_made_has_its_own_deadline() -> None:
    """A listener whose queue is full drops further SYNs, as a firewall does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        to = endpoint(
            f"http://127.0.0.1:{listener.getsockname()[1]}",
            Timeouts(connect=0.2, first_byte=20),
        )
        began = time.monotonic()
        _, error, _, _ = ask(to)
        for filler in fillers:
            filler.close()
    assert error is not None and error.outcome == "unreachable"
    assert "no connection in time" in error.message and time.monotonic() - began < 5


def test_a_closed_pooled_connection_is_asked_again_once() -> None:
    """The first request on a kept connection finds it closed: it is sent on a new one."""
    answer = b'{"id": "x"}'
    posts: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while len(posts) < 3:
                connection, _ = listener.accept()
                with connection:
                    while len(posts) < 3 and connection.recv(65536).startswith(b"POST"):
                        posts.append(connection.fileno())
                        if len(posts) == 2:
                            break  # closed without a byte
                        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                        connection.sendall(head + b"content-length: 11\r\n\r\n" + answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        to = endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", Timeouts(first_byte=5))

        async def use(client: UpstreamClient) -> list[bytes]:
            return [(await client.open(to, "completions", b"{}", {}, False)).body for _ in range(2)]

        assert run(use) == [answer, answer]
        thread.join(5)
    assert len(posts) == 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("1e9", 60.0), ("", None), ("soon", None),
     ("nan", None), ("inf", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
     ("Wed, 21 Oct 2099 07:28:00 GMT", 60.0)],
)  # fmt: skip
def test_retry_after_in_both_forms(value: str, seconds: float | None) -> None:
    assert retry_after(value) == seconds
