"""An upstream as cheap as Python makes it: fixed bytes over a raw asyncio.Protocol on uvloop.

Answers ``POST`` in one piece, or as server-sent events when the body asks for a stream: a role
chunk, 64 deltas, usage, ``[DONE]``, each a chunk of HTTP's chunked encoding. The word ``pace=N`` in
the request's text sends one event every N milliseconds instead of all at once; it goes through any
gateway unchanged. Nothing is parsed that need not be, so that the rig is not what is measured. It
is a collector of spans as well: what is posted to /v1/traces is taken and forgotten.

    python -m benchmarks.gateway.mock     prints {"url": ...} and serves until SIGTERM
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from typing import cast

import uvloop

DELTAS = 64
_PACE = re.compile(rb"pace=(\d+)")
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_HEAD = {"id": "chatcmpl-mock", "created": 1_700_000_000, "model": "mock"}
_USAGE = {"prompt_tokens": 48, "completion_tokens": DELTAS, "total_tokens": 48 + DELTAS}
_WORD = "token "


def _event(**more: object) -> bytes:
    value = {**_HEAD, "object": "chat.completion.chunk", **more}
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _choice(delta: dict[str, str], finish: str | None = None) -> list[dict[str, object]]:
    return [{"index": 0, "delta": delta, "finish_reason": finish}]


#: Every event of a stream: role, deltas, the finish reason, usage, the end marker.
EVENTS: tuple[bytes, ...] = (
    _event(choices=_choice({"role": "assistant", "content": ""})),
    *(_event(choices=_choice({"content": _WORD})) for _ in range(DELTAS)),
    _event(choices=_choice({}, "stop")),
    _event(choices=[], usage=_USAGE),
    b"data: [DONE]\n\n",
)
STREAM = b"".join(EVENTS)
_MESSAGE = {"role": "assistant", "content": _WORD * DELTAS}
BODY = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}],
        "usage": _USAGE,
    },
    separators=(",", ":"),
).encode()
_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_CHUNKS = tuple(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS)
_END = b"0\r\n\r\n"
_AT_ONCE = _STREAM_HEAD + b"".join(_CHUNKS) + _END
_TAKEN = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"
_NOTHING = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection, kept alive."""

    def __init__(self) -> None:
        self._buffer, self._needs = b"", 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer = data = self._buffer + data if self._buffer else data
        if len(data) < self._needs:
            return
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = data[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        self._needs = end + 4 + length
        if len(data) < self._needs:
            return
        self._buffer, self._needs = b"", 0
        self._answer(head, data)

    def _answer(self, head: bytes, data: bytes) -> None:
        if not head.startswith(b"post"):
            self._transport.write(_NOTHING)
        elif head.startswith(b"post /v1/traces"):
            self._transport.write(_TAKEN)
        elif not _STREAM.search(data):
            self._transport.write(_ANSWER)
        elif (pace := _PACE.search(data)) is None:
            self._transport.write(_AT_ONCE)
        else:
            self._transport.write(_STREAM_HEAD)
            self._next(0, int(pace[1]) / 1000)

    def _next(self, number: int, pace: float) -> None:
        """Write one event and arm the next."""
        self._transport.write(_CHUNKS[number])
        if number + 1 < len(_CHUNKS):
            self._timer = self._loop.call_later(pace, self._next, number + 1, pace)
        else:
            self._timer = None
            self._transport.write(_END)


async def _serve() -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    server = await loop.create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
    await over.wait()


if __name__ == "__main__":
    uvloop.run(_serve())
