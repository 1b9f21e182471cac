"""The receiving side of ASGI: a bounded body, and the moment when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Receive, Scope

from serving.gateway.envelope import ApiError


class Disconnected(Exception):
    """The client is gone, or does not take what it asked for."""


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The request's body, at most ``limit`` bytes, within ``seconds``.

    Raises ApiError body_too_large (before reading, where the length is declared),
    unsupported_media_type for compressed bodies (a small one could unpack to gigabytes),
    request_timeout; Disconnected.
    """
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity") not in (b"identity", b""):
        raise ApiError("unsupported_media_type", "Compressed bodies are not accepted.")
    kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError("unsupported_media_type", "The body must be application/json.")
    too_large = ApiError("body_too_large", f"The body has more than {limit} bytes.")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError("request_timeout", f"The body did not come in {seconds:g} s.") from None


class WhileConnected:
    """Use as ``async with``: the work inside is cancelled when the client disconnects, and
    Disconnected is raised instead. After the body nothing else can come from a client.

    Args:
        receive: ASGI.
        over: whether the response is complete; servers say "disconnected" then as well.
    """

    __slots__ = ("_gone", "_listener", "_over", "_receive", "_task")

    def __init__(self, receive: Receive, over: Callable[[], bool]) -> None:
        self._receive, self._over = receive, over
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._listener = asyncio.ensure_future(self._listen())

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._listener.cancel()
        if self._gone:
            self._task.uncancel()
            raise Disconnected from None

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._over():
            self._gone = True
            self._task.cancel()
