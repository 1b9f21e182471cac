"""The server's shortcuts: what they send is what ASGI's messages would have sent."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from serving.gateway.body import Disconnected, WhileConnected, read_body
from serving.gateway.http_cycle import connection
from serving.gateway.http_protocol import Protocol
from tests.serving.conftest import until

KEEP = 0.3
OK = (b"content-type", b"text/plain")


class App:
    """``/short`` answers by the shortcuts, ``/asgi`` by messages, both with what they were sent;
    ``/inject`` with a header that holds a line end; ``/wait`` never."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            try:
                async with WhileConnected(scope, receive, lambda: False):
                    await _forever()
            except Disconnected:
                self.left.set()
            return
        body = await read_body(scope, receive, 1 << 20, 5)
        self.bodies.append(body)
        headers = [OK, (b"content-length", b"%d" % len(body))]
        if scope["path"] == "/inject":
            headers.append((b"x-name", b"a\r\nx-other: b"))
        offered = connection(scope)
        assert offered is not None
        if scope["path"] == "/stream":
            start = {"type": "http.response.start", "status": 200, "headers": [OK]}
            assert not offered.write(b"too early")
            await send(start)
            assert offered.write(body)
            await send({"type": "http.response.body", "body": b"!"})
            assert not offered.write(b"too late")
        elif scope["path"] == "/asgi":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            assert offered.answer(200, headers, body)
            assert not offered.answer(200, headers, body)


async def _forever() -> None:
    await asyncio.Event().wait()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[App, Callable[[], socket.socket], uvicorn.Server]]:
    app = App()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_level="critical",
                                date_header=False, server_header=False)  # fmt: skip
        config.timeout_keep_alive = KEEP  # type: ignore[assignment]
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        until(lambda: server.started)
        yield app, lambda: socket.create_connection(sock.getsockname(), timeout=10), server
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def ask(client: socket.socket, path: str, body: bytes = b"hi", *more: str) -> bytes:
    """The answer's bytes, from a server that says how many."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json",
             f"content-length: {len(body)}", *more]  # fmt: skip
    client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return answer(client)


def answer(client: socket.socket) -> bytes:
    found = b""
    while b"\r\n\r\n" not in found:
        data = client.recv(1 << 16)
        if not data:
            return found
        found += data
    head, _, rest = found.partition(b"\r\n\r\n")
    chunked = b"chunked" in head
    length = 0 if chunked else int(head.lower().partition(b"content-length: ")[2].split()[0])
    while not rest.endswith(b"0\r\n\r\n") if chunked else len(rest) < length:
        rest += client.recv(1 << 20)
    return head + b"\r\n\r\n" + rest


@pytest.mark.parametrize("body", [b"", b"hi", b"x" * 70_000])
def test_both_ways_send_the_same_bytes(served: Any, body: bytes) -> None:
    _, connect, _ = served
    with connect() as client:
        short, plain = ask(client, "/short", body), ask(client, "/asgi", body)
        assert short == plain and short.endswith(b"\r\n\r\n" + body)
        short = ask(client, "/short", body, "connection: close")
        assert b"connection: close" in short and client.recv(1) == b""
    with connect() as client:
        assert ask(client, "/asgi", body, "connection: close") == short
        assert client.recv(1) == b""


def test_pieces_of_a_stream(served: Any) -> None:
    _, connect, _ = served
    with connect() as client:
        for _ in range(2):
            assert ask(client, "/stream").endswith(b"\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n")


def test_a_line_end_in_a_header_is_not_sent(served: Any) -> None:
    _, connect, _ = served
    with connect() as client:
        found = ask(client, "/inject")
    assert found.startswith(b"HTTP/1.1 500") and b"x-other" not in found


def test_a_body_in_pieces_and_one_that_asks_first(served: Any) -> None:
    app, connect, _ = served
    with connect() as client:
        head = b"POST /short HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
        client.sendall(head + b"\r\nab")
        with pytest.raises(TimeoutError):  # it waits for the rest
            client.settimeout(0.1)
            client.recv(1)
        client.settimeout(10)
        client.sendall(b"cd")
        assert answer(client).endswith(b"\r\n\r\nabcd") and app.bodies[-1] == b"abcd"
        client.sendall(head + b"expect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"efgh")
        assert answer(client).endswith(b"\r\n\r\nefgh")
        # Who does not wait for it is not told.
        client.sendall(head + b"expect: 100-continue\r\n\r\nijkl")
        assert answer(client).startswith(b"HTTP/1.1 200")


def test_the_first_of_two_requests_hears_that_its_client_left(served: Any) -> None:
    app, connect, server = served
    app.left.clear()
    with connect() as client:
        head = b"POST /wait HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        client.sendall(head + head)
        until(lambda: len(server.server_state.tasks) == 1)
    assert app.left.wait(10)
    until(lambda: not server.server_state.tasks and not server.server_state.connections)


def test_a_connection_that_is_used_stays_and_an_idle_one_is_closed(served: Any) -> None:
    _, connect, _ = served
    with connect() as client:
        began = time.monotonic()
        while time.monotonic() - began < 2 * KEEP:
            assert ask(client, "/short").endswith(b"hi")
            time.sleep(KEEP / 20)
        last = time.monotonic()
        assert client.recv(1) == b""  # closed
        assert time.monotonic() - last > KEEP / 2
