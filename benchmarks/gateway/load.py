"""The load generator: raw HTTP/1.1 with keep-alive over asyncio.Protocol, every sample kept.

``Connection.ask`` sends one prepared request and gives what came back with its times. There is no
HTTP library in the way: its cost would be a third of what is measured. Times are seconds of
``time.perf_counter``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit


@dataclass(slots=True)
class Answer:
    """What one request brought.

    Attributes:
        status: HTTP's; 0 when the connection broke.
        sent, first, last: when the request went out, when the first byte of the body came, and when
            the last one did.
        body: without HTTP's chunks.
        arrivals: when each read with body bytes came, and how many events it completed; only of
            streams.
    """

    sent: float
    status: int = 0
    first: float = 0.0
    last: float = 0.0
    body: bytes = b""
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.last - self.sent


#: Stands in a body where each request gets a number of its own, so that no cache answers.
NUMBER = b"000000000"


class Requests:
    """Endless POSTs that differ in one number. ``next`` gives the bytes of one."""

    def __init__(self, url: str, body: bytes, key: str = "") -> None:
        host = urlsplit(url).netloc
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n{authorization}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._before, self._after = (head.encode() + body).split(NUMBER, 1)
        self._numbers = itertools.count(time.monotonic_ns() % 500_000_000)

    def __next__(self) -> bytes:
        return b"%b%09d%b" % (self._before, next(self._numbers), self._after)


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[Answer] | None = None
        self._answer = Answer(0.0)
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._in_body = self._chunked = False
        self._left = 0  # bytes of the body, or of the chunk with its CRLF, still to come
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None:
            self._answer.status = 0
            self._done(time.perf_counter())

    def ask(self, data: bytes) -> asyncio.Future[Answer]:
        """Send; the future ends with the answer's last byte, or when the connection does."""
        self._reset()
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        self._answer = Answer(time.perf_counter())
        if self.transport.is_closing():
            self._done(self._answer.sent)
        else:
            self.transport.write(data)
        return waiter

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._in_body:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._buffer[:end].lower(), self._buffer[end + 4 :]
            self._buffer = b""
            self._answer.status = int(head[9:12])
            at = head.find(b"content-length:")
            self._chunked = at < 0
            self._left = 0 if at < 0 else int(head[at + 15 :].split(b"\r\n", 1)[0])
            self._in_body = True
        if self._chunked:
            self._dechunk(data, now)
        else:
            if data and not self._answer.first:
                self._answer.first = now
            self._parts.append(data)
            self._left -= len(data)
            if self._left <= 0:
                self._done(now)

    def _dechunk(self, data: bytes, now: float) -> None:
        data = self._buffer + data if self._buffer else data
        at, events = 0, 0
        while True:
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            size = int(data[at:end], 16)
            if len(data) < end + 4 + size:
                break
            if size == 0:
                self._arrived(now, events)
                self._done(now)
                return
            part = data[end + 2 : end + 2 + size]
            self._parts.append(part)
            events += part.count(b"\n\n")
            at = end + 4 + size
        self._buffer = data[at:]
        self._arrived(now, events)

    def _arrived(self, now: float, events: int) -> None:
        if events:
            self._answer.first = self._answer.first or now
            self._answer.arrivals.append((now, events))

    def _done(self, now: float) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            self._answer.last, self._answer.body = now, b"".join(self._parts)
            waiter.set_result(self._answer)


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, parts.hostname, parts.port)
    return connection


async def sequence(url: str, requests: Requests, count: int, warm: int = 5) -> list[Answer]:
    """``count`` answers, one after the other on one new connection, after ``warm`` more."""
    connection = await connect(url)
    try:
        for _ in range(warm):
            await connection.ask(next(requests))
        return [await connection.ask(next(requests)) for _ in range(count)]
    finally:
        connection.transport.close()


async def closed_loop(
    url: str, requests: Requests, connections: int, seconds: float, warm: float = 0.5
) -> tuple[list[Answer], float]:
    """Each of the connections asks again as soon as it is answered.

    Returns the answers that ended within ``seconds`` after ``warm``, and the measured seconds. An
    answer that broke is followed by a new connection, and is in the list with status 0.
    """
    found: list[Answer] = []
    begin = time.perf_counter() + warm
    end = begin + seconds

    async def client() -> None:
        connection = await connect(url)
        while (now := time.perf_counter()) < end:
            answer = await connection.ask(next(requests))
            if answer.status == 0:
                connection = await connect(url)
            if begin <= answer.last <= end:
                found.append(answer)
            elif now > end:
                break
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return found, seconds
