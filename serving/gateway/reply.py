"""The response side of one request: starts once, tells one error, has a deadline to write."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from starlette.types import Scope, Send

from serving.gateway.body import Disconnected
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.http_cycle import connection
from serving.gateway.waiting import within

_JSON = (b"content-type", b"application/json")


class Reply:
    """Writes frames or one whole body.

    Args:
        exchange: whose ids go into the headers.
        scope, send: ASGI.
        write_seconds: for one piece; a client that does not take it is given up.
    """

    def __init__(self, exchange: Exchange, scope: Scope, send: Send, write_seconds: float) -> None:
        self._exchange, self._send, self._seconds = exchange, send, write_seconds
        self._offered = connection(scope)
        self.started = self.ended = False

    async def frame(self, data: bytes) -> None:
        """One server-sent event; the first one starts the response."""
        if not self.started:
            kind = b"text/event-stream; charset=utf-8"
            await self._start(200, kind, (b"cache-control", b"no-cache"))
        if data and self._offered is not None and self._offered.write(data):
            return
        await self._put({"type": "http.response.body", "body": data, "more_body": True})

    def is_over(self) -> bool:
        """Whether nothing more will be sent."""
        return self.ended

    async def json(self, value: dict[str, Any], status: int = 200) -> None:
        await self.whole(status, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    async def whole(self, status: int, data: bytes) -> None:
        """A JSON body as it is."""
        await self._whole(status, data, [])

    async def end(self) -> None:
        if self.started and not self.ended:
            self.ended = True
            await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def error(self, error: ApiError) -> None:
        """A status and an envelope, or one error frame when the stream has begun. The stream is
        then ended without ``[DONE]`` and without a finish reason: it did not finish."""
        with contextlib.suppress(Disconnected, OSError):
            if self.started:
                if not self.ended:
                    await self.frame(error.frame(self._exchange.response_id))
                    await self.end()
                return
            headers = [(k.encode(), v.encode()) for k, v in error.all_headers().items()]
            await self._whole(error.status, error.body(self._exchange.response_id), headers)

    async def _whole(self, status: int, data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        length = (b"content-length", b"%d" % len(data))
        if self._offered is not None:
            all_headers = [_JSON, length, *headers, *self._exchange.headers()]
            if self._offered.answer(status, all_headers, data):
                self.started = self.ended = True
                return
        await self._start(status, _JSON[1], length, *headers)
        self.ended = True
        await self._put({"type": "http.response.body", "body": data, "more_body": False})

    async def _start(self, status: int, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        self.started = True
        headers = [(b"content-type", content_type), *more, *self._exchange.headers()]
        await self._put({"type": "http.response.start", "status": status, "headers": headers})

    async def _put(self, message: dict[str, Any]) -> None:
        """Send, or give the client up when it does not take the bytes in time."""
        try:
            await within(self._seconds, self._send(message))  # type: ignore[arg-type]
        except (TimeoutError, OSError):
            raise Disconnected from None
