"""One connection to an upstream and its answers: llhttp behind a protocol of our own.

A connection has one answer at a time and one timer, which is looked at again when it fires: while
answers come in time, none is armed or cancelled. Of an answer that did not end the connection is
closed; one that ended whole, with nothing after it, gives it back to the pool.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, cast

import httptools

#: Bytes of an answer that may wait for their reader before the upstream has to.
MAX_UNREAD = 1 << 17
#: Bytes of a head; of one compressed piece when it is unpacked.
MAX_HEAD, MAX_UNPACKED = 64 << 10, 64 << 20


class ConnectError(OSError):
    """No connection could be made; the argument says why."""


class BrokenError(OSError):
    """The connection ended before the answer did.

    Attributes:
        stale: it was a kept connection, and not a byte of the answer had come: the request may
            never have been read.
    """

    def __init__(self, stale: bool) -> None:
        super().__init__("the connection ended before the answer")
        self.stale = stale


class NoHttpError(ValueError):
    """What came is not HTTP as it was asked for."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go to."""

    host: str  # a name or an address, without brackets
    port: int
    tls: bool = False


class Answer:
    """One answer. ``status`` and ``header`` hold once ``Client.ask`` has given it.

    ``read`` gives what is there; ``close`` leaves, from wherever it stands.
    """

    __slots__ = ("_broke", "_connection", "_headers", "_pieces", "_size", "_unpack", "_waiter",
                 "complete", "heard", "status")  # fmt: skip

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._unpack: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._broke: Exception | None = None
        self.status = 0  # 0: the head is not here
        self.heard = self.complete = False

    def header(self, name: bytes) -> str:
        """The first header of that name (lower case); "" without one."""
        for key, value in self._headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return ""

    async def read(self, until: float) -> bytes:
        """What has come, at once; else what comes next. b"" at the end.

        Args:
            until: ``loop.time()`` at which waiting ends.

        Raises TimeoutError, BrokenError or NoHttpError.
        """
        while not self._pieces:
            if self.complete:
                return b""
            await self._wait(until)
        pieces, self._pieces, self._size = self._pieces, [], 0
        if self._connection is not None:
            self._connection.resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def head(self, until: float) -> None:
        """Wait for the status and the headers."""
        while not self.status:
            await self._wait(until)

    def close(self) -> None:
        """Leave. Of an answer that has not ended the connection is closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.leave()

    async def _wait(self, until: float) -> None:
        if self._broke is not None:
            raise self._broke
        connection = self._connection
        if connection is None:
            raise BrokenError(False)  # left
        self._waiter = waiter = connection.expect(until)
        try:
            await waiter
        finally:
            self._waiter = None

    # -- told by the connection -----------------------------------------------------------------

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def broken(self, error: Exception) -> None:
        """There will be no more."""
        self._broke, self._connection = error, None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    @property
    def waited_for(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def add_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def began(self, status: int) -> None:
        """The head is whole."""
        self.status = status
        coding = self.header(b"content-encoding").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):  # identity was asked for; some do not listen
            self._unpack = zlib.decompressobj(47)
        elif coding not in ("", "identity"):
            raise NoHttpError(f"its answer is in the coding {coding[:20]!r}")

    def restart(self) -> None:
        """That was an informational answer."""
        self._headers.clear()

    def add(self, piece: bytes) -> bool:
        """A piece of the body; whether more than enough waits now."""
        if self._unpack is not None:
            try:
                piece = self._unpack.decompress(piece, MAX_UNPACKED)
            except zlib.error:
                raise NoHttpError("its answer cannot be unpacked") from None
            if self._unpack.unconsumed_tail:
                raise NoHttpError("its answer unpacks to far more than it has")
            if not piece:
                return False
        self._pieces.append(piece)
        self._size += len(piece)
        return self._size > MAX_UNREAD

    def ended(self) -> None:
        """All of it is here; the connection is another's from now on."""
        self.complete, self._connection = True, None
        self.wake()

    @property
    def until_close(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return bool(self.status) and not (
            self.header(b"content-length") or self.header(b"transfer-encoding")
        )


class Pool(Protocol):
    """Where connections stand between two answers."""

    def give_back(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection; one answer at a time."""

    def __init__(self, pool: Pool, origin: Origin) -> None:
        self._pool, self.origin = pool, origin
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._until = inf
        self._head = 0  # bytes that came before the head was whole
        self._paused = self._informational = False
        self._ended = False  # the answer is whole
        self._spoiled = False  # not to be used again
        self._kept = False  # had an answer before this one
        self.idle_since = 0.0

    # -- for answers ----------------------------------------------------------------------------

    def send(self, head: bytes, body: bytes) -> Answer:
        """Write a request."""
        transport = self._transport
        assert transport is not None and self._answer is None
        self._answer = answer = Answer(self)
        self._ended, self._head = False, 0
        if len(body) < 1 << 14:
            transport.write(head + body)
        else:
            transport.writelines((head, body))
        return answer

    def expect(self, until: float) -> asyncio.Future[None]:
        """A future that the answer may wake, and that fails at ``until``."""
        self._until = until
        if until < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = self._loop.call_at(until, self._look), until
        return self._loop.create_future()

    def resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def leave(self) -> None:
        """Nobody wants the rest."""
        self._answer = None
        self.close()

    def close(self) -> None:
        """Close at once: what was not written yet is not wanted any more."""
        self._pool.closed(self)
        transport = self._transport
        if transport is not None:
            if self.origin.tls or transport.get_write_buffer_size():
                transport.abort()
            else:
                transport.close()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _look(self) -> None:
        """The timer has fired; most often for a wait that ended long ago."""
        self._timer, self._timer_at = None, inf
        answer = self._answer
        if answer is None or not answer.waited_for:
            return
        if self._loop.time() < self._until:
            self._timer, self._timer_at = self._loop.call_at(self._until, self._look), self._until
            return
        self._fail(TimeoutError())

    def _fail(self, error: Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.broken(error)
        self.close()

    # -- asyncio --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.close()  # nothing was asked
            return
        answer.heard = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._ended:
                inner = error.__context__  # what a callback raised
                wrong = inner if isinstance(inner, NoHttpError) else NoHttpError("it is no HTTP")
                self._fail(wrong)
                return
            self._spoiled = True  # the answer is whole, and what follows it is none
        if not answer.status:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._fail(NoHttpError(f"its head has more than {MAX_HEAD} bytes"))
        elif self._ended:
            self._over(answer)
        else:
            answer.wake()

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.closed(self)
        answer, self._answer, self._transport = self._answer, None, None
        if answer is not None:
            if exc is None and answer.until_close:
                answer.ended()
            else:
                answer.broken(BrokenError(self._kept and not answer.heard))

    def _over(self, answer: Answer) -> None:
        """The answer is whole: keep the connection if it is clean."""
        transport = self._transport
        assert transport is not None
        self._answer = None
        # Bytes that were not written yet: it answered before it had read the request.
        if self._spoiled or transport.get_write_buffer_size():
            self.close()
        else:
            self.resume()
            self._kept = True
            self._pool.give_back(self)
        answer.ended()

    # -- llhttp ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._ended:
            self._spoiled = True  # more than was asked for: whose answer would the next one be?

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None and not self._spoiled:
            self._answer.add_header(name, value)

    def on_headers_complete(self) -> None:
        if self._answer is None or self._spoiled:
            return
        status = self._parser.get_status_code()
        self._informational = status < 200
        if not self._informational:
            self._answer.began(status)

    def on_body(self, body: bytes) -> None:
        if self._answer is None or self._spoiled:
            return
        if self._answer.add(body) and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._informational and self._answer is not None:
            self._answer.restart()
        elif not self._spoiled:
            self._ended, self._spoiled = True, not self._parser.should_keep_alive()
