"""The way to the engine: one aiohttp session, one kind of call, every failure a stable code.

Chat completions are always streamed from the engine, also for clients that want one JSON body: a
stall is then seen when it happens, the first token is timed, and leaving the call aborts the
generation in vLLM. aiohttp's defaults are changed where they break this: no total timeout, its own
deadlines for connecting, for the first byte and between bytes; a pool without the limit of 100; and
keep-alive under vLLM's 5 s, so that a request does not go into a connection that is being closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp

from serving.gateway.envelope import ApiError
from serving.gateway.sse import Frame, Frames, MalformedStream


@dataclass(frozen=True)
class Deadlines:
    """Seconds. ``first_byte`` covers the engine's queue and its prefill."""

    connect: float = 2.0
    first_byte: float = 120.0
    stall: float = 30.0


class Unreachable(ApiError):
    """No connection, or it broke before a byte of the answer: asking again is safe."""

    def __init__(self, detail: str) -> None:
        super().__init__("engine_unreachable", f"The engine cannot be reached: {detail}")


class EngineClient:
    """Speaks to engines by URL. Use as ``async with``."""

    def __init__(self, deadlines: Deadlines = Deadlines()) -> None:
        self.deadlines = deadlines
        self._session: Any = None

    async def __aenter__(self) -> EngineClient:
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self.deadlines.connect,
            sock_read=self.deadlines.first_byte,
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=timeout,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def stream(
        self,
        url: str,
        body: dict[str, Any],
        request_id: str,
        trace: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncGenerator[tuple[Frame | None, dict[str, Any]], None]:
        """Frames of one chat completion with their parsed data, without the final ``[DONE]``.

        Raises ApiError: Unreachable, engine_overloaded, engine_timeout, engine_error,
        context_length_exceeded, engine_disconnected, engine_malformed_stream. Closing the iterator
        closes the connection.
        """
        response = await self._open(url, body, request_id, trace)
        try:
            async for frame in self._frames(response):
                if frame.done:
                    await _to_end(response)
                    return
                if not frame.data:
                    continue  # a keep-alive comment
                chunk = _parsed(frame)
                if chunk.get("error") is not None:
                    raise in_stream_error(chunk["error"])
                yield frame, chunk
            raise ApiError("engine_disconnected", "The engine ended the answer before its end.")
        finally:
            response.close()  # of a body read to its end, the connection is kept

    async def healthy(self, url: str, seconds: float = 2.0) -> bool:
        """Whether the engine's own health check passes."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as response:
                return bool(response.status == 200)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def token(self, url: str, model: str, seconds: float = 30.0) -> bool:
        """Whether a token comes out: the only health that means anything to a user."""
        body = {
            "model": model,
            "max_tokens": 1,
            "temperature": 0,
            "messages": [{"role": "user", "content": "ping"}],
        }
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            call = self._session.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)
            async with call as response:
                value = await response.json() if response.status == 200 else {}
                return bool(((value or {}).get("usage") or {}).get("completion_tokens"))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False

    async def _open(
        self, url: str, body: dict[str, Any], request_id: str, trace: Mapping[str, str]
    ) -> Any:
        """The engine's response with its head read; asked again once when a pooled connection
        turns out to be closed."""
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        headers = {"content-type": "application/json", "x-request-id": request_id, **trace}
        for attempt in (1, 2):
            try:
                response = await self._session.post(
                    f"{url}/v1/chat/completions", data=data, headers=headers, allow_redirects=False
                )
                break
            except aiohttp.ServerTimeoutError as error:
                if isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise Unreachable("no connection in time") from None
                raise ApiError("engine_timeout", "The engine gave no first byte in time.") from None
            except aiohttp.ClientConnectorError as error:
                raise Unreachable(str(error.os_error)) from None
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                if attempt == 2:
                    raise Unreachable("it closed the connection") from None
            except aiohttp.ClientError as error:
                raise ApiError("engine_error", f"The engine does not speak HTTP: {error}") from None
        if response.status != 200:
            try:
                raise await refusal(response)
            finally:
                response.close()
        return response

    async def _frames(self, response: Any) -> AsyncIterator[Frame]:
        """Whole frames; a stall, a reset and bad framing become ApiErrors."""
        frames = Frames()
        wait = self.deadlines.first_byte
        try:
            while True:
                async with asyncio.timeout(wait):
                    data = await response.content.readany()
                if not data:
                    break
                wait = self.deadlines.stall
                for frame in frames.feed(data):
                    yield frame
            for frame in frames.rest():
                yield frame
        except TimeoutError:
            raise ApiError("engine_timeout", f"The engine fell silent for {wait:g} s.") from None
        except (aiohttp.ClientError, OSError):
            raise ApiError("engine_disconnected", "The connection to the engine broke.") from None
        except MalformedStream as error:
            raise ApiError("engine_malformed_stream", f"The engine's stream: {error}.") from None


async def _to_end(response: Any) -> None:
    """Read the end of the body, so that the connection goes back into the pool."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(0.2):
            while await response.content.readany():
                pass


def _parsed(frame: Frame) -> dict[str, Any]:
    try:
        return frame.json()
    except MalformedStream as error:
        raise ApiError("engine_malformed_stream", f"The engine's stream: {error}.") from None


async def refusal(response: Any) -> ApiError:
    """What a status other than 200 means. A client reads the engine's words on its own faults."""
    try:
        async with asyncio.timeout(5):
            raw = await response.content.read(64_000)
        value = json.loads(raw)
        error = value.get("error", value)
        message = str(error.get("message", ""))[:1000]
    except (ValueError, AttributeError, aiohttp.ClientError, TimeoutError, OSError):
        message = ""
    if response.status == 400:
        if "context length" in message or "maximum input length" in message:
            return ApiError("context_length_exceeded", message, "messages")
        return ApiError("engine_refused_request", message or "The engine refused the request.")
    if response.status in (429, 503):
        retry = response.headers.get("retry-after", "")
        return ApiError(
            "engine_overloaded",
            "The engine's queue is full.",
            headers={"retry-after": retry} if retry.isdigit() else {},
        )
    return ApiError("engine_error", f"The engine answered {response.status}.")


def in_stream_error(error: Any) -> ApiError:
    """An ``error`` object inside a stream that began with status 200."""
    message = str(error.get("message", "") if isinstance(error, dict) else error)[:300]
    code = error.get("code") if isinstance(error, dict) else None
    if code in (429, 503, "429", "503"):
        return ApiError("engine_overloaded", "The engine's queue is full.")
    return ApiError("engine_error", f"The engine failed while answering: {message}")
