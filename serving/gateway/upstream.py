"""One call to one upstream: the request out, the first byte back, the rest as it comes.

Everything that can go wrong becomes an ``UpstreamError``: a stable code for the client, and for the
router what it means (``outcome``): whether the breaker counts it and whether another candidate may
do better. The caller hands in bytes and gets bytes; nothing is parsed that need not be.

Every wait has its deadline: for connecting, for the first byte and between bytes, and none is a
timer of its own; see ``http_client``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import orjson
from yarl import URL

from serving.gateway.api_request import Kind
from serving.gateway.endpoint import Endpoint, origin_of, request_line
from serving.gateway.envelope import ApiError
from serving.gateway.http_client import Client
from serving.gateway.http_connection import Answer, BrokenError, ConnectError, NoHttpError
from serving.gateway.scan import Scanner
from serving.gateway.sse import MalformedStream
from serving.gateway.upstream_errors import (
    Outcome,
    UpstreamError,
    in_stream_error,
    refusal,
)

#: Headers of the gateway's own request that may go on. Everything else that a client sent stays
#: here: its key, hop-by-hop headers, cookies, and every x-* by which an engine or a proxy between
#: could take the client for somebody else.
FORWARDED = ("traceparent", "tracestate")
MAX_BODY = 64 << 20  # of an answer in one piece: embeddings of 2,048 inputs have about 40 MiB
#: A pooled connection that the upstream had closed shows it within a round trip; a request that
#: kills its engine takes longer and is not sent again here.
STALE_SECONDS = 0.25
_ERROR = re.compile(rb'"error"\s*:\s*(?!null|\s)')
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')


def _nothing(outcome: Outcome) -> None:
    """Nobody wants to know."""


class UpstreamResponse:
    """An answer whose first event, or whole body, is here. Use as ``async with``.

    Attributes:
        body: the whole answer; b"" of a stream.
        scan: what was recognised in the stream so far.
        on_end: told the outcome, once.
    """

    def __init__(
        self, endpoint: Endpoint, response: Answer, scan: Scanner, first_byte_until: float
    ) -> None:
        self.endpoint, self.scan = endpoint, scan
        self.body = b""
        self.tier = ""  # what the router took the request for
        self.price: str | None = None  # of the candidate, in the price table
        self.on_end: Callable[[Outcome], None] = _nothing
        self._response = response
        self._first = b""
        self._time = asyncio.get_running_loop().time
        self._ends = self._time() + endpoint.timeouts.whole
        self._begins = first_byte_until  # 0.0: it has begun
        self._open = True

    async def __aenter__(self) -> UpstreamResponse:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UpstreamError):  # whoever reads the events found that they are none
            self.failed(error)
        self.close()

    @property
    def usage(self) -> dict[str, Any] | None:
        """Tokens as the upstream counted them, of a stream once it has ended."""
        if not self.body:
            return self.scan.usage
        # Bodies of embeddings are large and end in it.
        found = _USAGE.findall(self.body[-8192:])
        try:
            return dict(orjson.loads(found[-1])) if found else None
        except orjson.JSONDecodeError:
            return None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Whole events as they came; what one read brought comes as one piece.

        Raises UpstreamError: disconnected, timeout, malformed, or what an error event says. Then
        nothing of that event was given out, and a client's stream can be ended by an event of ours.
        """
        self._begins = 0.0
        try:
            error: UpstreamError | None = None
            if self._first:
                yield self._first
            while not (self.scan.done or self.scan.error is not None):
                try:
                    data = await self._read()
                    out = self._scanned(data)
                except UpstreamError as found:
                    error = found
                    break
                if out:
                    yield out
                if not data:
                    break
            error = error or self._verdict()
            if error is None:
                await self._to_end()
                return
            if self.scan.mid_event:
                yield b"\n\n"  # so that an event of ours is one
            self.failed(error)
            raise error
        finally:
            if self.scan.done and self.scan.error is None:
                self.done()
            self.close()

    def _verdict(self) -> UpstreamError | None:
        """What is wrong with a stream that was read to its end."""
        if self.scan.error is not None:
            return in_stream_error(self.scan.error)
        if not self.scan.done:
            return UpstreamError("disconnected", "The engine ended the answer before its end.")
        return None

    def done(self) -> None:
        """The answer was whole."""
        self._end("ok")

    def failed(self, error: ApiError) -> None:
        """The answer broke. Errors that are not the upstream's do not count against it."""
        self._end(error.outcome if isinstance(error, UpstreamError) else "ok")

    def close(self) -> None:
        """Leave. Of an answer that has not ended, the connection is closed: vLLM aborts it."""
        self._end("cancelled")

    def _end(self, outcome: Outcome) -> None:
        if self._open:
            self._open = False
            self._response.close()  # a body that was read to its end has given its connection back
            self.on_end(outcome)

    async def begin(self) -> None:
        """Read until an event with data is here, or the stream's end. Comments alone are waiting:
        some providers send them while a request queues."""
        while not (self.scan.events or self.scan.oversized or self.scan.error is not None):
            data = await self._read()
            self._first += self._scanned(data)
            if not data:
                break
        if self.scan.error is not None:  # nothing of this answer went out: asking again is safe
            raise in_stream_error(self.scan.error)
        if not self.scan.events and not self.scan.oversized:
            raise UpstreamError("disconnected", "The engine ended the answer before its beginning.")

    async def collect(self) -> None:
        """Read the whole body."""
        pieces, size = [], 0
        while data := await self._read():
            pieces.append(data)
            size += len(data)
            if size > MAX_BODY:
                raise UpstreamError("malformed", f"The engine's answer has over {MAX_BODY} bytes.")
        self.body = b"".join(pieces)
        if not self.body.rstrip().endswith(b"}"):
            raise UpstreamError("malformed", "The engine's answer is not a JSON object.")
        if _ERROR.search(self.body, 0, 4096):
            try:
                value = orjson.loads(self.body)
            except orjson.JSONDecodeError:
                raise UpstreamError("malformed", "The engine's answer is not JSON.") from None
            if isinstance(value, dict) and value.get("error") is not None:
                raise in_stream_error(value["error"])

    def _scanned(self, data: bytes) -> bytes:
        """What may go out of a read; b"" means the end of the stream."""
        try:
            if data:
                return self.scan.feed(data)
            rest = self.scan.rest()
        except MalformedStream as error:
            raise UpstreamError("malformed", f"The engine's stream: {error}.") from None
        return rest if self.scan.done else b""

    async def _read(self) -> bytes:
        """What is there, at once; else wait. b"" at the end."""
        now, timeouts = self._time(), self.endpoint.timeouts
        if now >= self._ends:
            raise self._late(now)
        until = min(now + timeouts.stall, self._ends)
        try:
            return await self._response.read(min(until, self._begins) if self._begins else until)
        except TimeoutError:
            raise self._late(self._time()) from None
        except NoHttpError as error:
            raise UpstreamError("malformed", f"The engine does not speak HTTP: {error}.") from None
        except BrokenError:
            raise UpstreamError("disconnected", "The connection to the engine broke.") from None

    def _late(self, now: float) -> Exception:
        """Which deadline that was; before the first byte it is the caller's."""
        timeouts = self.endpoint.timeouts
        if self._begins and now >= self._begins:
            return TimeoutError()
        if now >= self._ends:
            return UpstreamError("timeout", f"The engine did not end within {timeouts.whole:g} s.")
        return UpstreamError("timeout", f"The engine fell silent for {timeouts.stall:g} s.")

    async def _to_end(self) -> None:
        """Read the end of the body, so that the connection goes back into the pool."""
        response, until = self._response, self._time() + 0.2
        with contextlib.suppress(OSError, NoHttpError):  # TimeoutError is one
            while not response.complete and await response.read(until):
                pass


class UpstreamClient:
    """Speaks to every upstream. Use as ``async with``."""

    def __init__(self) -> None:
        self.http = Client()

    async def __aenter__(self) -> UpstreamClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.http.close()

    async def open(
        self,
        endpoint: Endpoint,
        kind: Kind,
        data: bytes,
        headers: Mapping[str, str],
        stream: bool,
        *,
        hide_usage: bool = False,
        want_text: bool = False,
    ) -> UpstreamResponse:
        """The answer with its first event (``stream``) or its whole body here.

        Args:
            data: the body, complete.
            headers: of the gateway's request, lower case; only FORWARDED ones and our own
                ``x-request-id`` go out.
            hide_usage, want_text: see Scanner.

        Raises UpstreamError. Leaving (cancellation) closes the connection.
        """
        timeouts = endpoint.timeouts
        patience = timeouts.first_byte if stream or kind == "embeddings" else timeouts.unstreamed
        until = asyncio.get_running_loop().time() + patience
        head = endpoint.heads[kind] + outgoing(headers, len(data))
        response = None
        try:
            raw = await self._head(endpoint, head, data, until)
            scan = Scanner(hide_usage=hide_usage, want_text=want_text)
            response = UpstreamResponse(endpoint, raw, scan, until)
            if raw.status != 200:
                raise await refusal(raw, endpoint.dialect, until)
            if not stream:
                await response.collect()
            elif is_event_stream(raw):
                await response.begin()
            else:
                await response.collect()  # some say their errors so
                raise UpstreamError("malformed", "The engine's answer is no event stream.")
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, TimeoutError):
                what = "no first byte" if stream else "no answer"
                raise UpstreamError("timeout", f"The engine gave {what} in time.") from None
            raise
        return response

    async def get(self, url: str, seconds: float, limit: int = 4 << 20) -> bytes | None:
        """The body of a GET that answers 200 within ``seconds``, its first ``limit`` bytes; None
        otherwise."""
        parsed = URL(url)
        until = asyncio.get_running_loop().time() + seconds
        head, body = request_line("GET", parsed) + b"\r\n", bytearray()
        try:
            answer = await self.http.ask(origin_of(parsed), head, connect=seconds, until=until)
            try:
                while len(body) < limit and (data := await answer.read(until)):
                    body += data
            finally:
                answer.close()
        except (OSError, NoHttpError):
            return None
        return bytes(body[:limit]) if answer.status == 200 else None

    async def _head(self, endpoint: Endpoint, head: bytes, data: bytes, until: float) -> Answer:
        """The answer with its head read; asked again once, on a new connection, when a kept one
        turns out to be closed."""
        time = asyncio.get_running_loop().time
        began, connect = time(), endpoint.timeouts.connect
        for again in (False, True):
            try:
                return await self.http.ask(
                    endpoint.origin, head, data, connect=connect, until=until, fresh=again
                )
            except ConnectError as error:
                raise _unreachable(str(error)) from None
            except BrokenError as error:
                if again or not error.stale or time() - began > STALE_SECONDS:
                    raise _unreachable("it closed the connection") from None
            except NoHttpError as error:
                what = f"The engine does not speak HTTP: {error}."
                raise UpstreamError("error", what) from None
        raise AssertionError("unreachable")


def _unreachable(detail: str) -> UpstreamError:
    return UpstreamError("unreachable", f"The engine cannot be reached: {detail}.")


def is_event_stream(answer: Answer) -> bool:
    kind = answer.header(b"content-type")
    return kind.split(";", 1)[0].strip().lower() == "text/event-stream"


def outgoing(headers: Mapping[str, str], length: int) -> bytes:
    """What the head of a request to an upstream ends with."""
    lines = f"content-length: {length}\r\n"
    for name in (*FORWARDED, "x-request-id"):
        value = headers.get(name)
        if value is not None:
            lines += f"{name}: {value}\r\n"
    return lines.encode("latin-1") + b"\r\n"
