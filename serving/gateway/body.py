"""The receiving side of ASGI: a bounded body, and the moment when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Scope

from serving.gateway.envelope import ApiError
from serving.gateway.http_cycle import connection
from serving.gateway.waiting import within


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
    kind = headers.get(b"content-type", b"application/json")
    if kind != b"application/json" and kind.split(b";")[0].strip().lower() != b"application/json":
        raise ApiError("unsupported_media_type", "The body must be application/json.")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    offered = connection(scope)
    if offered is not None and (body := offered.whole_body()) is not None:
        if len(body) > limit:
            raise _too_large(limit)
        return body
    try:
        return await within(seconds, _whole(receive, limit))
    except TimeoutError:
        raise ApiError("request_timeout", f"The body did not come in {seconds:g} s.") from None


async def _whole(receive: Receive, limit: int) -> bytes:
    """Every piece of the body."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError("body_too_large", f"The body has more than {limit} bytes.")


class WhileConnected:
    """Use as ``async with``: the work inside is cancelled when the client disconnects, and
    Disconnected is raised instead. After the body nothing else can come from a client.

    Our own server calls when the client leaves. Another one's ``receive`` is stepped by hand: a
    task of its own for each request would be made, scheduled and cancelled.

    Args:
        scope, receive: ASGI; what ``receive`` waits for are asyncio's futures.
        over: whether the response is complete; servers say "disconnected" then as well.
    """

    __slots__ = ("_gone", "_listening", "_offered", "_over", "_receive", "_task", "_waits")

    def __init__(self, scope: Scope, receive: Receive, over: Callable[[], bool]) -> None:
        self._receive, self._over = receive, over
        self._offered = connection(scope)
        self._gone = False
        self._listening: Any = None
        self._waits: Any = None

    async def __aenter__(self) -> None:
        offered = self._offered
        if offered is not None:
            if offered.disconnected:
                raise Disconnected
            self._task = offered.task
            offered.watch(self._left)
            return
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._listening = self._receive()
        self._step()

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if self._offered is not None:
            self._offered.watch(None)
        elif self._listening is not None:
            if self._waits is not None:
                self._waits.remove_done_callback(self._step)
            self._listening.close()
            self._listening = None
        if self._gone:
            self._task.uncancel()
            raise Disconnected from None

    def _left(self) -> None:
        """The client is gone."""
        if not self._over():
            self._gone = True
            self._task.cancel()

    def _step(self, ready: object = None) -> None:
        """Go on until a future is waited for, or the client is gone."""
        self._waits = None
        while self._listening is not None:  # None: the call was on its way when the work ended
            try:
                waits = self._listening.send(None)
            except StopIteration as end:
                if end.value["type"] == "http.disconnect":
                    break
                self._listening = self._receive()
                continue
            waits._asyncio_future_blocking = False  # as a task does that has seen it
            waits.add_done_callback(self._step)
            self._waits = waits
            return
        if self._listening is not None:
            self._left()
