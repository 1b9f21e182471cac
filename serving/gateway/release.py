"""``POST /v1/chat/completions``: question, passages, prompt, engine, answer with citations.

A plain ASGI application. It takes the live release once; passages, prompt and engine of an answer
are that release's. The engine's frames are relayed as they come; the one with the finish reason
also carries ``citations`` and ``release``. Headers wait for the engine's first event, so that
everything that fails before it has an honest status. A client that leaves ends the engine's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from contracts.errors import RatchetError
from contracts.records import REFUSAL, Citation
from resources import rag
from serving.gateway.body import Disconnected, client_left, read_body
from serving.gateway.chat_request import ChatRequest, parse
from serving.gateway.engine import EngineClient, Unreachable
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.live import Live, LiveRelease
from serving.gateway.metrics import Metrics
from serving.gateway.reply import Reply
from serving.gateway.request_log import RequestLog
from serving.gateway.retrieval import Retriever
from serving.gateway.sse import Frame, Relabel, encode

log = logging.getLogger("ratchet.gateway.chat")
#: Names that mean "what the channel serves"; the channel's own name is one as well.
ALIAS = "ratchet"
Events = AsyncIterator[tuple[Frame | None, dict[str, Any]]]


@dataclass(frozen=True)
class Limits:
    """What one request and all of them together may take."""

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    in_flight: int = 512
    start_seconds: float = 60.0  # a request may wait for the first release to be opened


class Chat:
    """The endpoint, made of its parts."""

    def __init__(
        self,
        live: LiveRelease,
        engine: EngineClient,
        retriever: Retriever,
        request_log: RequestLog,
        metrics: Metrics,
        limits: Limits = Limits(),
    ) -> None:
        self.live, self.engine, self.retriever = live, engine, retriever
        self.request_log, self.metrics, self.limits = request_log, metrics, limits
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.live.channel)
        reply = Reply(exchange, send, self.engine.deadlines.write)
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            await self._guarded(scope, receive, exchange, reply)
        finally:
            self.request_log.offer(exchange.finish(self.metrics))
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def _guarded(
        self, scope: Scope, receive: Receive, exchange: Exchange, reply: Reply
    ) -> None:
        """Work until done or the client is gone; every failure ends in one error, told once."""
        try:
            if self._in_flight > self.limits.in_flight:
                raise ApiError("overloaded", "Too many requests are in flight.")
            raw = await read_body(scope, receive, self.limits.body_bytes, self.limits.body_seconds)
            async with client_left(receive) as left:
                work = asyncio.ensure_future(self._answer(raw, exchange, reply))
                await _first(work, left)
        except Disconnected:
            exchange.error = ApiError("client_disconnected", "The client left.")
        except ApiError as error:
            exchange.error = error
            await reply.error(error)
        except asyncio.CancelledError:
            exchange.error = ApiError("client_disconnected", "The gateway was shut down.")
            raise
        except Exception as error:
            # People's words may stand in the exception's message: its type and place must do.
            place = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", exchange.response_id, type(error).__name__, place)
            exchange.error = ApiError("internal_error", "The gateway failed; its log says why.")
            await reply.error(exchange.error)

    async def _answer(self, raw: bytes, exchange: Exchange, reply: Reply) -> None:
        request = parse(raw)
        exchange.stream, exchange.question = request.stream, request.question
        if request.model not in (ALIAS, self.live.channel):
            raise ApiError(
                "model_not_found",
                f"There is no model '{request.model[:64]}'; use '{self.live.channel}'.",
                "model",
            )
        live = exchange.live = await self.live.now(self.limits.start_seconds)
        if live is None:
            raise ApiError("not_ready", f"The gateway is not ready: {self.live.problem}")
        try:
            await self._from(live, request, exchange, reply)
        except Unreachable:
            # The engine may just have been stopped after a deployment that we have not seen yet.
            # Nothing was sent, so the whole request can run again, all of it on the new release.
            if not await self.live.refresh() or self.live.current is None:
                raise
            exchange.live = self.live.current
            await self._from(self.live.current, request, exchange, reply)

    async def _from(
        self, live: Live, request: ChatRequest, exchange: Exchange, reply: Reply
    ) -> None:
        """Answer from one release."""
        exchange.passages, exchange.retrieval_ms = await self.retriever.retrieve(
            live.rag, request.question
        )
        if exchange.passages:
            body = engine_body(live, request, exchange)
            url = live.channel.engine_url
            events: Events = self.engine.stream(url, body, exchange.response_id)
        else:
            exchange.refused_by = "gateway"
            events = _refusal()
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            if request.stream:
                await _relay(events, request, exchange, reply)
            else:
                await _collect(events, request, exchange, reply)


def engine_body(live: Live, request: ChatRequest, exchange: Exchange) -> dict[str, Any]:
    """What the engine is asked. The release's own bound on tokens cannot be raised."""
    try:
        messages = live.rag.messages(request.question, exchange.passages)
    except RatchetError as error:
        log.error("%s: %s", exchange.response_id, error)
        raise ApiError("internal_error", "The release's prompt does not render.") from None
    return {
        "model": live.channel.model,
        "messages": messages,
        "temperature": 0.0,
        **request.sampling,
        "max_tokens": min(request.max_tokens or live.max_tokens, live.max_tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _refusal() -> AsyncIterator[tuple[None, dict[str, Any]]]:
    """The refusal as an engine would stream it. No engine is asked."""
    head = {"id": "", "object": "chat.completion.chunk", "created": int(time.time()), "model": ""}

    def chunk(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    yield None, chunk({"role": "assistant", "content": ""}, None)
    yield None, chunk({"content": REFUSAL}, None)
    yield None, chunk({}, "stop")
    yield None, {**head, "choices": [], "usage": usage}


def note(chunk: dict[str, Any], exchange: Exchange) -> tuple[str | None, bool]:
    """Take text, usage and finish reason out of a chunk.

    Returns the finish reason, and whether the chunk was changed: space before an answer's first
    word is taken away, as it is offline (a nano model's first token is dropped by the engine and
    leaves its space behind).
    """
    exchange.usage(chunk.get("usage"))
    choices, changed = chunk.get("choices"), False
    if not choices:
        return None, False
    try:
        delta = choices[0].get("delta") or {}
        text, finish = delta.get("content"), choices[0].get("finish_reason")
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ApiError(
            "engine_malformed_stream", "The engine's stream: a chunk without its fields."
        ) from None
    if isinstance(text, str) and text:
        if not exchange.answer and text[0].isspace():
            text, changed = text.lstrip(), True
            delta["content"] = text
        if text:
            exchange.first_text()
            exchange.answer.append(text)
    return (finish if isinstance(finish, str) else None), changed


def citations(exchange: Exchange) -> list[dict[str, Any]]:
    """The answer's citations as the response carries them."""
    found: list[Citation] = rag.cite(exchange.text, exchange.passages)
    return [citation.model_dump() for citation in found]


async def _relay(events: Events, request: ChatRequest, exchange: Exchange, reply: Reply) -> None:
    """Frames to the client as they come."""
    relabel = Relabel(exchange.response_id, request.model)
    finished = False
    async for frame, chunk in events:
        finish, changed = note(chunk, exchange)
        if finish is not None:
            finished = True
            extra = {"citations": citations(exchange), "release": exchange.release}
            await reply.frame(relabel.final(chunk, extra))
        elif not chunk.get("choices") and not request.include_usage:
            continue  # the usage that only we asked for
        elif frame is None or changed:
            await reply.frame(encode({**chunk, **relabel.names}))
        else:
            await reply.frame(relabel(frame, chunk))
    if not finished:
        raise ApiError("engine_disconnected", "The engine's answer has no end.")
    await reply.frame(b"data: [DONE]\n\n")
    await reply.end()


async def _collect(events: Events, request: ChatRequest, exchange: Exchange, reply: Reply) -> None:
    """The whole answer as one JSON body."""
    reason: str | None = None
    async for _, chunk in events:
        reason = note(chunk, exchange)[0] or reason
    if reason is None:
        raise ApiError("engine_disconnected", "The engine's answer has no end.")
    prompt, completion = exchange.prompt_tokens or 0, exchange.completion_tokens or 0
    message = {"role": "assistant", "content": exchange.text, "refusal": None}
    await reply.json(
        {
            "id": exchange.response_id,
            "object": "chat.completion",
            "created": int(exchange.arrived.timestamp()),
            "model": request.model,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
            "citations": citations(exchange),
            "release": exchange.release,
        }
    )


async def _first(work: asyncio.Future[None], left: asyncio.Future[None]) -> None:
    """Wait for the work; cancel it, and wait for that, when the client leaves first."""
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
    if work.cancelled():
        raise Disconnected
    work.result()
