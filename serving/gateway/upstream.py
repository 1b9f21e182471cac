"""One call to one upstream: the request out, the first byte back, the rest as it comes.

Everything that can go wrong becomes an ``UpstreamError``: a stable code for the client, and for the
router what it means (``outcome``): whether the breaker counts it and whether another candidate may
do better. The caller hands in bytes and gets bytes; nothing is parsed that need not be.

aiohttp's defaults are changed where they break this: no total timeout of 300 s; deadlines of our
own for connecting, for the first byte and between bytes; a pool without the limit of 100; and
keep-alive under vLLM's 5 s, so that a request does not go into a connection that is being closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, PositiveFloat
from yarl import URL

from serving.gateway.api_request import PATHS, Kind
from serving.gateway.envelope import ApiError
from serving.gateway.scan import Scanner
from serving.gateway.sse import MalformedStream
from serving.gateway.upstream_errors import (
    Dialect,
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


class Timeouts(BaseModel):
    """Seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect: PositiveFloat = 2.0  # TCP and TLS
    first_byte: PositiveFloat = 120.0  # the engine's queue and its prefill
    stall: PositiveFloat = 30.0  # between two reads
    unstreamed: PositiveFloat = 600.0  # an answer in one piece, which shows nothing before its end
    whole: PositiveFloat = 1800.0  # a stream, dripping ones included


@dataclass(frozen=True)
class Endpoint:
    """One replica of one model: what a call needs to know. ``url`` is without ``/v1``."""

    provider: str  # a label: bounded by the configuration
    url: str
    model: str  # the upstream's name for it
    dialect: Dialect = "openai"
    api_key: str = field(default="", repr=False)
    timeouts: Timeouts = field(default_factory=Timeouts)
    # Made once: yarl and attrs cost more than the rest of a call.
    urls: dict[Kind, URL] = field(default_factory=dict, init=False, repr=False, compare=False)
    http_timeout: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        base = self.url.rstrip("/")
        self.urls.update({kind: URL(base + path) for kind, path in PATHS.items()})
        # `connect` would arm a timer for each request; name look-ups fall under `first_byte`.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect)
        object.__setattr__(self, "http_timeout", timeout)


def _nothing(outcome: Outcome) -> None:
    """Nobody wants to know."""


class UpstreamResponse:
    """An answer whose first event, or whole body, is here. Use as ``async with``.

    Attributes:
        body: the whole answer; b"" of a stream.
        scan: what was recognised in the stream so far.
        on_end: told the outcome, once.
    """

    def __init__(self, endpoint: Endpoint, response: Any, scan: Scanner) -> None:
        self.endpoint, self.scan = endpoint, scan
        self.body = b""
        self.attempts = 1
        self.tier = ""  # what the router took the request for
        self.price: str | None = None  # of the candidate, in the price table
        self.on_end: Callable[[Outcome], None] = _nothing
        self._response = response
        self._first = b""
        self._loop = asyncio.get_running_loop()
        self._ends = self._loop.time() + endpoint.timeouts.whole
        self._waits_since = 0.0  # 0: nobody is reading
        self._late = ""
        self._timer: asyncio.TimerHandle | None = None
        self._open = True

    async def __aenter__(self) -> UpstreamResponse:
        return self

    async def __aexit__(self, *exc: object) -> None:
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
        if self._open:
            self._watch()
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
            if self._timer is not None:
                self._timer.cancel()
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
        self._watch()
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
        self._waits_since = self._loop.time()
        try:
            data: bytes = await self._response.content.readany()
        except (aiohttp.ClientError, OSError):
            if self._late:
                raise UpstreamError("timeout", self._late) from None
            raise UpstreamError("disconnected", "The connection to the engine broke.") from None
        self._waits_since = 0.0
        return data

    def _watch(self) -> None:
        """One timer for the stream, set anew when it fires: nothing to do per read."""
        now, stall = self._loop.time(), self.endpoint.timeouts.stall
        silent = now - self._waits_since if self._waits_since else 0.0
        if silent >= stall:
            self._late = f"The engine fell silent for {stall:g} s."
        elif now >= self._ends:
            self._late = f"The engine did not end within {self.endpoint.timeouts.whole:g} s."
        else:
            self._timer = self._loop.call_at(min(now - silent + stall, self._ends), self._watch)
            return
        self._response.close()

    async def _to_end(self) -> None:
        """Read the end of the body, so that the connection goes back into the pool."""
        if self._response.content.at_eof():
            return
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(0.2):
                while await self._response.content.readany():
                    pass


class UpstreamClient:
    """Speaks to every upstream. Use as ``async with``."""

    def __init__(self) -> None:
        self._session: Any = None

    async def __aenter__(self) -> UpstreamClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

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
        response = None
        try:
            async with asyncio.timeout(patience):
                raw = await self._head(endpoint, kind, data, outgoing(headers, endpoint.api_key))
                scan = Scanner(hide_usage=hide_usage, want_text=want_text)
                response = UpstreamResponse(endpoint, raw, scan)
                if raw.status != 200:
                    raise await refusal(raw, endpoint.dialect)
                if not stream:
                    await response.collect()
                elif raw.content_type == "text/event-stream":
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
        """The body of a GET that answers 200 within ``seconds``; None otherwise."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
                return bytes(await response.content.read(limit)) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def _head(
        self, endpoint: Endpoint, kind: Kind, data: bytes, headers: dict[str, str]
    ) -> Any:
        """The response with its head read; sent again once when a pooled connection turns out to
        be closed."""
        began = time.monotonic()
        for attempt in (1, 2):
            try:
                return await self._session.post(
                    endpoint.urls[kind],
                    data=data if len(data) <= 1 << 20 else io.BytesIO(data),
                    headers=headers,
                    timeout=endpoint.http_timeout,
                    allow_redirects=False,
                )
            except aiohttp.ServerTimeoutError:
                raise _unreachable("no connection in time") from None
            except aiohttp.ClientConnectorError as error:
                raise _unreachable(error.os_error.strerror or "no connection") from None
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                if attempt == 2 or time.monotonic() - began > STALE_SECONDS:
                    raise _unreachable("it closed the connection") from None
            except aiohttp.ClientError as error:
                what = type(error).__name__
                raise UpstreamError("error", f"The engine does not speak HTTP: {what}") from None
        raise AssertionError("unreachable")


def _unreachable(detail: str) -> UpstreamError:
    return UpstreamError("unreachable", f"The engine cannot be reached: {detail}.")


def outgoing(headers: Mapping[str, str], api_key: str) -> dict[str, str]:
    """The headers of the request to an upstream."""
    found = {name: headers[name] for name in (*FORWARDED, "x-request-id") if name in headers}
    if api_key:
        found["authorization"] = f"Bearer {api_key}"
    return found
