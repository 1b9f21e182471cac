"""Answers of a release: question, passages, prompt, engine, answer with citations.

The live release is taken once; passages, prompt and engine of an answer are that release's. The
engine is always asked for a stream, also for clients that want one JSON body: a stall is then seen
when it happens, and the first token is timed. Headers wait for the engine's first event, so that
everything that fails before it has an honest status. A client that leaves ends the engine's work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from contracts.errors import RatchetError
from contracts.records import Passage
from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.cache.response_cache import Flight, Hit
from serving.gateway.chat_request import ChatRequest, parse
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.chunks import ChunkGuard
from serving.gateway.limits import Lease
from serving.gateway.limits.tokens import MARKS, estimate
from serving.gateway.live import Live, LiveRelease
from serving.gateway.release_answer import DONE, Telling, kept, recall, refusal
from serving.gateway.reply import Reply
from serving.gateway.scan import BYTES_PER_TOKEN
from serving.gateway.services import Services
from serving.gateway.split import candidate_route, choose
from serving.gateway.sse import Frames
from serving.gateway.turn import Turn
from serving.gateway.upstream import UpstreamResponse
from serving.gateway.upstream_errors import UpstreamError

log = logging.getLogger("ratchet.gateway.release")
#: Names that mean "what the channel serves"; the channel's own name is one as well.
ALIAS = "ratchet"
#: Reserved for a passage before it is known: chunks have at most 254 tokens of the embedding
#: model, and a small vocabulary needs twice as many for the same words.
PASSAGE_TOKENS = 512


async def answer(
    services: Services,
    source: LiveRelease,
    given: dict[str, Any],
    exchange: Exchange,
    reply: Reply,
) -> None:
    """Answer one request from what a channel serves. Raises ApiError; after the first byte, the
    stream has begun."""
    turn = Turn.begin(services, exchange, reply)
    exchange.channel = source.channel
    asked = parse(given)
    exchange.stream, exchange.question = asked.stream, asked.question
    live = await source.now(turn.now.config.requests.start_seconds)
    if live is None:
        raise ApiError("not_ready", f"The gateway is not ready: {source.problem}")
    trial = source.trial
    live = choose(trial, live, exchange, turn.principal, services.salt)
    _take(turn, live, asked)
    request = _request(live, asked, exchange.session)
    lease = await _reserve(turn, live, request)
    with lease:
        exchange.limits(lease)
        await turn.check_input(request)
        exchange.question = asked.question = request.body["messages"][0]["content"]
        try:
            await _answer_or_move(turn, source, live, asked, request)
        finally:
            used = (exchange.prompt_tokens or 0) + (exchange.completion_tokens or 0)
            lease.settle(tokens=used, cost=0.0)
            if exchange.exposed:
                services.metrics.prompt_exposures.labels(exchange.prompt_version).inc()
    if trial is not None and trial.copies and exchange.rollout:
        services.shadow.offer(turn, trial, asked)


def _take(turn: Turn, live: Live, asked: ChatRequest) -> None:
    """Answer from this release, with the version of its prompt that this session sees. Raises
    ApiError for a key that may not use it."""
    _check_allowed(turn.principal, live, asked)
    exchange = turn.exchange
    exchange.live = live
    plan = turn.services.prompts.plan(turn.now.config.prompts, live)
    exchange.choice = plan.choose(turn.principal.tenant, exchange.session, exchange.response_id)


def _check_allowed(principal: Principal, live: Live, asked: ChatRequest) -> None:
    """A key that may not name a release learns as little as from a name that does not exist."""
    if not principal.key.allows_release(live.channel.name, live.release):
        raise ApiError("model_not_found", f"There is no model '{asked.model[:64]}'.", "model")


def _request(live: Live, asked: ChatRequest, session: str) -> ApiRequest:
    """The question with everything in force that its answer depends on beside the release. The
    release's own bound on tokens cannot be raised."""
    most = min(asked.max_tokens or live.max_tokens, live.max_tokens)
    body = {
        "messages": [{"role": "user", "content": asked.question}],
        "temperature": 0.0,
        **asked.sampling,
        "max_tokens": most,
    }
    return ApiRequest(
        "chat",
        asked.model,
        body,
        stream=asked.stream,
        include_usage=asked.stream and asked.include_usage,
        max_tokens=most,
        session=session,
    )


async def _reserve(turn: Turn, live: Live, request: ApiRequest) -> Lease:
    services, principal = turn.services, turn.principal
    longest = turn.now.config.limits.max_prompt_tokens(principal)
    if longest is not None:
        counter = services.tokenizers.open(live.tokenizer)
        await counter.count(request, longest)
    prompt = estimate(request) + live.rag.top_k * PASSAGE_TOKENS + MARKS
    return await services.limiter.reserve(
        principal,
        tokens=prompt + (request.max_tokens or 0),
        cost=0.0,  # engines of releases are our own
        session=request.session,
    )


async def _answer_or_move(
    turn: Turn, source: LiveRelease, live: Live, asked: ChatRequest, request: ApiRequest
) -> None:
    try:
        await _answer_from(turn, live, asked, request)
    except UpstreamError as error:
        # The engine may just have been stopped after a deployment that we have not seen yet. Where
        # nothing of an answer came, the whole request can run again, all of it on the new release.
        # Nobody has to bear with a candidate: whatever it is that it cannot do.
        gone = error.outcome in ("unreachable", "disconnected")
        gone = gone or turn.exchange.arm == "candidate"
        if not gone or turn.exchange.answer or turn.reply.started:
            raise
        await source.refresh()
        following = source.current
        if following is None or following is live:
            raise
        turn.exchange.moved = turn.exchange.arm == "candidate"
        _take(turn, following, asked)
        # What is reserved is the first release's bound.
        bound = min(request.body["max_tokens"], following.max_tokens)
        request.body["max_tokens"] = request.max_tokens = bound
        await _answer_from(turn, following, asked, request)


async def ask(turn: Turn, live: Live, asked: ChatRequest, flight: Flight) -> None:
    """Let a release answer; nothing is sent, and nobody is told but the exchange. Raises ApiError.

    For copies of requests: what was asked has been let in, and whoever asked has his answer.
    """
    request = _request(live, asked, turn.exchange.session)
    telling, _ = await _ask(turn, live, asked, request, flight)
    telling.end()


async def _answer_from(turn: Turn, live: Live, asked: ChatRequest, request: ApiRequest) -> None:
    """Answer from one release, or with what it answered before."""
    exchange = turn.exchange
    scope = turn.scope(request, await live.target(), prompt=exchange.prompt_version)
    found = await turn.services.cache.lookup(scope)
    if isinstance(found, Hit):
        recall(found.answer, exchange)
        await turn.replay(request, found)
        return
    with found as flight:
        telling, guard = await _ask(turn, live, asked, request, flight)
        telling.end()
        if asked.stream:
            await _tell(turn, flight, iter([DONE]))
            await turn.reply.end()
            body = flight.body
        else:
            body = telling.body()
            await turn.reply.whole(200, body)
        _judge(turn, guard, request)
        flight.put(kept(exchange, body, turn.changed))


async def _ask(
    turn: Turn, live: Live, asked: ChatRequest, request: ApiRequest, flight: Flight
) -> tuple[Telling, ChunkGuard | None]:
    """Find passages, and ask the engine where there are any."""
    exchange, guards = turn.exchange, turn.now.guards
    found, exchange.retrieval_ms = await turn.services.retriever.retrieve(live.rag, asked.question)
    exchange.passages = _as_data(turn, found)
    if not exchange.passages:
        exchange.refused_by = "gateway"
        exchange.prompt_tokens = exchange.completion_tokens = 0
        telling = Telling(asked, exchange, None)
        for chunk in refusal():
            await _tell(turn, flight, telling.chunk(chunk))
        return telling, None
    messages, secret = await _rendered(turn, live, asked)
    guard: ChunkGuard | None = None
    probe = guards.stream(turn.policy, request, secret)
    if probe is not None and probe.changes:
        guard = ChunkGuard(lambda: guards.stream(turn.policy, request, secret))
    telling = Telling(asked, exchange, guard)
    await _from_engine(turn, live, request, messages, telling, flight)
    return telling, guard


async def _from_engine(
    turn: Turn,
    live: Live,
    request: ApiRequest,
    messages: list[dict[str, Any]],
    telling: Telling,
    flight: Flight,
) -> None:
    """Ask the release's engine and tell what it says."""
    exchange = turn.exchange
    body = {**request.body, "messages": messages}
    upward = ApiRequest(
        "chat",
        request.model,
        body,
        stream=True,
        include_usage=request.include_usage,
        max_tokens=request.max_tokens,
        session=request.session,
    )
    name = live.channel.name
    if exchange.arm == "candidate" and not exchange.moved:
        name = candidate_route(name)
    route = turn.services.router.route_to(name, live.channel.engine_url, live.channel.model)
    sent = sum(len(message["content"].encode()) for message in messages)
    try:
        async with await turn.open(route, upward) as response:
            try:
                await _relay(turn, response, telling, flight)
            finally:
                turn.ended(response)
    except asyncio.CancelledError:
        _estimate(sent, exchange)  # whoever leaves has had his prompt read
        raise
    finally:
        if exchange.answer:
            _estimate(sent, exchange)


async def _relay(turn: Turn, response: UpstreamResponse, telling: Telling, flight: Flight) -> None:
    frames = Frames()
    async for data in response.chunks():
        await _tell(turn, flight, telling.frames(frames.feed(data)))
    await _tell(turn, flight, telling.frames(frames.rest()))  # an end without its empty line


async def _tell(turn: Turn, flight: Flight, events: Iterator[bytes]) -> None:
    """What one read brought goes out as one piece, and so does what stands before an error."""
    pieces: list[bytes] = []
    try:
        for event in events:
            pieces.append(event)
    finally:
        if pieces:
            out = b"".join(pieces)
            flight.write(out)
            await turn.reply.frame(out)


def _judge(turn: Turn, guard: ChunkGuard | None, request: ApiRequest) -> None:
    """Note what the guards of the answer said."""
    exchange, guards = turn.exchange, turn.now.guards
    for verdict in guard.verdicts() if guard else ():
        exchange.judged(verdict)
    if guards.reads_output(turn.policy):
        seen = guard.guard() if guard else None
        exchange.judged(
            guards.after_stream(turn.policy, seen, exchange.text, request, exchange.response_id)
        )


def _estimate(sent: int, exchange: Exchange) -> None:
    """Count an answer of an engine that did not, because it broke or its client left."""
    if exchange.completion_tokens is None:
        exchange.tokens_estimated = True
        exchange.prompt_tokens = -(-sent // BYTES_PER_TOKEN)
        written = -(-len(exchange.text.encode()) // BYTES_PER_TOKEN)
        exchange.completion_tokens = max(len(exchange.answer), written)


def _as_data(turn: Turn, found: list[Passage]) -> list[Passage]:
    """The passages as they may enter a prompt; what gives orders is taken out of them."""
    texts = [passage.text for passage in found]
    shown, verdict = turn.now.guards.check_passages(turn.policy, texts)
    turn.exchange.judged(verdict)
    kept = [
        passage if text == passage.text else passage.model_copy(update={"text": text})
        for passage, text in zip(found, shown, strict=True)
        if text is not None
    ]
    if len(kept) == len(found):
        return kept
    return [passage.model_copy(update={"n": n}) for n, passage in enumerate(kept, start=1)]


async def _rendered(
    turn: Turn, live: Live, asked: ChatRequest
) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages for the engine, and what of them must not come out."""
    exchange = turn.exchange
    prompt = exchange.choice.prompt if exchange.choice else live.rag.prompt
    try:
        messages, instructions = await turn.services.prompts.render(
            prompt, asked.question, exchange.passages
        )
    except RatchetError as error:
        log.error("%s: %s", exchange.response_id, error)
        raise ApiError("internal_error", "The release's prompt does not render.") from None
    return messages, [instructions] if instructions else []
