"""Answers of a release: question, passages, prompt, engine, answer with citations.

The live release is taken once; passages, prompt and engine of an answer are that release's. The
engine's frames are relayed as they come; the one with the finish reason also carries ``citations``
and ``release``. Headers wait for the engine's first event, so that everything that fails before it
has an honest status. A client that leaves ends the engine's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from contracts.errors import RatchetError
from contracts.records import REFUSAL, Citation, Passage
from resources import rag
from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.chat_request import ChatRequest, parse
from serving.gateway.engine import Unreachable
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.chunks import ChunkGuard
from serving.gateway.limits.tokens import MARKS, estimate
from serving.gateway.live import Live
from serving.gateway.reply import Reply
from serving.gateway.scan import BYTES_PER_TOKEN
from serving.gateway.services import Configured, Services
from serving.gateway.sse import Frame, Relabel, encode

log = logging.getLogger("ratchet.gateway.release")
#: Names that mean "what the channel serves"; the channel's own name is one as well.
ALIAS = "ratchet"
#: Reserved for a passage before it is known: chunks have at most 254 tokens of the embedding
#: model, and a small vocabulary needs twice as many for the same words.
PASSAGE_TOKENS = 512
Events = AsyncGenerator[tuple[Frame | None, dict[str, Any]], None]


async def answer(
    services: Services, given: dict[str, Any], exchange: Exchange, reply: Reply
) -> None:
    """Answer one request. Raises ApiError; after the first byte, the stream has begun."""
    now, principal = services.now, exchange.principal
    assert principal is not None
    exchange.channel = services.live.channel
    asked = parse(given)
    exchange.stream, exchange.question = asked.stream, asked.question
    live = exchange.live = await services.live.now(now.config.requests.start_seconds)
    if live is None:
        raise ApiError("not_ready", f"The gateway is not ready: {services.live.problem}")
    _check_allowed(principal, live, asked)
    _choose(services, now, live, exchange)
    request = ApiRequest(
        "chat",
        asked.model,
        {"messages": [{"role": "user", "content": asked.question}]},
        stream=asked.stream,
        session=exchange.session,
    )
    longest = now.config.limits.max_prompt_tokens(principal)
    if longest is not None:
        counter = services.tokenizers.open(live.tokenizer)
        await counter.count(request, longest)
    most = min(asked.max_tokens or live.max_tokens, live.max_tokens)
    lease = await services.limiter.reserve(
        principal,
        tokens=estimate(request) + live.rag.top_k * PASSAGE_TOKENS + MARKS + most,
        cost=0.0,  # engines of releases are our own
        session=exchange.session,
    )
    with lease:
        exchange.limits(lease)
        policy = now.policy(principal)
        verdict = await now.guards.check_input(policy, request, exchange.response_id)
        exchange.judged(verdict)
        exchange.question = asked.question = request.body["messages"][0]["content"]
        if verdict.error is not None:
            raise verdict.error
        try:
            await _on_the_live_one(services, now, live, asked, request, exchange, reply)
        finally:
            used = (exchange.prompt_tokens or 0) + (exchange.completion_tokens or 0)
            lease.settle(tokens=used, cost=0.0)
            if exchange.exposed:
                services.metrics.prompt_exposures.labels(exchange.prompt_version).inc()


async def _on_the_live_one(
    services: Services,
    now: Configured,
    live: Live,
    asked: ChatRequest,
    request: ApiRequest,
    exchange: Exchange,
    reply: Reply,
) -> None:
    try:
        await _from(services, now, live, asked, request, exchange, reply)
    except Unreachable:
        # The engine may just have been stopped after a deployment that we have not seen yet.
        # Nothing was sent, so the whole request can run again, all of it on the new release.
        if not await services.live.refresh() or services.live.current is None:
            raise
        exchange.live = following = services.live.current
        assert exchange.principal is not None
        _check_allowed(exchange.principal, following, asked)
        _choose(services, now, following, exchange)
        await _from(services, now, following, asked, request, exchange, reply)


async def _from(
    services: Services,
    now: Configured,
    live: Live,
    asked: ChatRequest,
    request: ApiRequest,
    exchange: Exchange,
    reply: Reply,
) -> None:
    """Answer from one release."""
    found, exchange.retrieval_ms = await services.retriever.retrieve(live.rag, asked.question)
    assert exchange.principal is not None
    policy = now.policy(exchange.principal)
    exchange.passages = _as_data(now, policy, found, exchange)
    guard: ChunkGuard | None = None
    sent = 0  # bytes of the prompt
    if exchange.passages:
        body, secret = await engine_body(services, live, asked, exchange)
        sent = sum(len(message["content"].encode()) for message in body["messages"])
        events: Events = services.engine.stream(
            live.channel.engine_url, body, exchange.response_id, exchange.trace.call()
        )
        exchange.provider = "release"
        probe = now.guards.stream(policy, request, secret)
        if probe is not None and probe.changes:
            guard = ChunkGuard(lambda: now.guards.stream(policy, request, secret))
            events = _guarded(events, guard)
    else:
        exchange.refused_by = "gateway"
        events = _refusal()
    try:
        async with contextlib.aclosing(events):
            if asked.stream:
                await _relay(events, asked, exchange, reply)
            else:
                await _collect(events, asked, exchange, reply)
    except asyncio.CancelledError:
        _estimate(sent, exchange)  # whoever leaves has had his prompt read
        raise
    finally:
        exchange.trace.answered()
        if exchange.answer:
            _estimate(sent, exchange)
    for verdict in guard.verdicts() if guard else ():
        exchange.judged(verdict)
    if now.guards.reads_output(policy):
        exchange.judged(
            now.guards.after_stream(
                policy,
                guard.guard() if guard else None,
                exchange.text,
                request,
                exchange.response_id,
            )
        )


def _estimate(sent: int, exchange: Exchange) -> None:
    """Count an answer of an engine that did not, because it broke or its client left."""
    if sent and exchange.completion_tokens is None:
        exchange.tokens_estimated = True
        exchange.prompt_tokens = -(-sent // BYTES_PER_TOKEN)
        written = -(-len(exchange.text.encode()) // BYTES_PER_TOKEN)
        exchange.completion_tokens = max(len(exchange.answer), written)


def _choose(services: Services, now: Configured, live: Live, exchange: Exchange) -> None:
    """The version of the release's prompt that this session sees."""
    tenant = exchange.principal.key.tenant if exchange.principal else ""
    plan = services.prompts.plan(now.config.prompts, live)
    exchange.choice = plan.choose(tenant, exchange.session, exchange.response_id)


def _check_allowed(principal: Principal, live: Live, asked: ChatRequest) -> None:
    """A key that may not name a release learns as little as from a name that does not exist."""
    if not principal.key.allows_release(live.channel.name, live.release):
        raise ApiError("model_not_found", f"There is no model '{asked.model[:64]}'.", "model")


def _as_data(
    now: Configured, policy: str, found: list[Passage], exchange: Exchange
) -> list[Passage]:
    """The passages as they may enter a prompt; what gives orders is taken out of them."""
    shown, verdict = now.guards.check_passages(policy, [passage.text for passage in found])
    exchange.judged(verdict)
    kept = [
        passage if text == passage.text else passage.model_copy(update={"text": text})
        for passage, text in zip(found, shown, strict=True)
        if text is not None
    ]
    if len(kept) == len(found):
        return kept
    return [passage.model_copy(update={"n": n}) for n, passage in enumerate(kept, start=1)]


async def _guarded(events: Events, guard: ChunkGuard) -> Events:
    """Chunks as their guard lets them out; they are serialised anew."""
    async with contextlib.aclosing(events):
        async for _, chunk in events:
            for out in guard.through(chunk):
                yield None, out


async def engine_body(
    services: Services, live: Live, request: ChatRequest, exchange: Exchange
) -> tuple[dict[str, Any], list[str]]:
    """What the engine is asked, and what of it must not come out. The release's own bound on tokens
    cannot be raised."""
    prompt = exchange.choice.prompt if exchange.choice else live.rag.prompt
    try:
        messages, instructions = await services.prompts.render(
            prompt, request.question, exchange.passages
        )
    except RatchetError as error:
        log.error("%s: %s", exchange.response_id, error)
        raise ApiError("internal_error", "The release's prompt does not render.") from None
    body = {
        "model": live.channel.model,
        "messages": messages,
        "temperature": 0.0,
        **request.sampling,
        "max_tokens": min(request.max_tokens or live.max_tokens, live.max_tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body, [instructions] if instructions else []


async def _refusal() -> Events:
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
