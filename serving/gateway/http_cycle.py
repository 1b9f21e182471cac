"""One request and its answer on a connection: uvicorn's, with shortcuts for our own handler.

ASGI's messages are general: each is a dictionary, a coroutine and a look at every header, even for
a request that is here whole and an answer that is sent in one piece. The server therefore offers
itself as an extension of the scope (``connection``), and the handler uses it where nothing has to
be waited for. Whoever does not know it speaks plain ASGI, also in the middle of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

EXTENSION = "ratchet.connection"
#: Above this, a head and its body are written as two pieces and not copied into one.
JOINED = 1 << 16


class Cycle(RequestResponseCycle):
    """See the module."""

    _on_gone: Callable[[], None] | None = None
    task: asyncio.Task[None]  # that answers

    def whole_body(self) -> bytes | None:
        """The request's body when it is here whole, and then once; else None."""
        if self.more_body or self.disconnected or self.response_complete:
            return None
        self.flow.resume_reading()  # or nobody would see the client leave
        self.message_event.clear()
        self.waiting_for_100_continue = False
        body, self.body = bytes(self.body), bytearray()
        return body

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """Have ``on_gone`` called when the client leaves; None: nobody any more."""
        self._on_gone = on_gone
        self.flow.resume_reading()  # another request that waits its turn may have stopped it

    def gone(self) -> None:
        """The client has left; whoever waits is told."""
        self.disconnected = True
        self.message_event.set()
        if self._on_gone is not None:
            self._on_gone()

    def answer(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer now; False when that is not possible and ``send`` has to wait.

        Args:
            headers: names in lower case; with ``content-length``, without ``connection``.
        """
        if self.response_started or self.disconnected or self.flow.write_paused:
            return False
        lines = [STATUS_LINE[status][:-2]]
        lines += [b"%b: %b" % pair for pair in self.default_headers]
        lines += [b"%b: %b" % pair for pair in headers]
        if not self.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines)
        if head.count(b"\r") != len(lines) - 1 or head.count(b"\n") != len(lines) - 1:
            raise RuntimeError("A line end in a header.")
        self.response_started = self.response_complete = True
        if len(body) < JOINED:
            self.transport.write(b"%b\r\n\r\n%b" % (head, body))
        else:
            self.transport.writelines((head, b"\r\n\r\n", body))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    def write(self, data: bytes) -> bool:
        """Send a piece of an answer in chunks that has begun; False when ``send`` has to do it."""
        if not self.chunked_encoding or self.response_complete or self.disconnected:
            return False
        if self.flow.write_paused:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


def connection(scope: Scope) -> Cycle | None:
    """The server's offer, if it made one."""
    return cast(Cycle | None, cast(Any, scope).get("extensions", {}).get(EXTENSION))
