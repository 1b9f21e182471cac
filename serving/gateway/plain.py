"""Answers of plain models: what a client asked goes to a candidate, and what comes goes back.

Bytes are relayed as the upstream sent them, unless a guard has to hold text back or change it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import orjson

from serving.gateway import plain_request
from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.cache.answer import Answer
from serving.gateway.cache.response_cache import Flight, Hit
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.chunks import ChunkGuard, guard_body
from serving.gateway.limits import Lease
from serving.gateway.limits.config import counts_tokens
from serving.gateway.limits.tokens import most_tokens
from serving.gateway.reply import Reply
from serving.gateway.routing.router import Route
from serving.gateway.services import Configured, Services
from serving.gateway.sse import Frame, Frames, MalformedStream, encode
from serving.gateway.turn import Turn
from serving.gateway.upstream import UpstreamResponse
from serving.gateway.upstream_errors import UpstreamError


async def answer(
    services: Services,
    route: Route,
    given: dict[str, Any],
    exchange: Exchange,
    reply: Reply,
) -> None:
    """Answer one request. Raises ApiError; after the first byte, the stream has begun."""
    turn = Turn.begin(services, exchange, reply)
    now, principal = turn.now, turn.principal
    request = plain_request.parse(exchange.kind, route.name, given)
    exchange.stream = request.stream
    request.session = exchange.session = exchange.session or request.session
    if request.kind != "embeddings" and request.max_tokens is None:
        _bound(now, route, principal, request)
    prompt, most = await _size(turn, route, request)
    cost = now.dearest[route.name].of(prompt, most - prompt)
    lease = await services.limiter.reserve(
        principal, tokens=most, cost=cost, session=request.session
    )
    with lease:
        exchange.limits(lease)
        await turn.check_input(request)
        content = now.config.logs.content
        if content:
            exchange.question = "\n".join(request.texts())
        temperature = route.defaults.get("temperature", 1.0)
        scope = turn.scope(request, now.targets[route.name], temperature=temperature)
        found = await services.cache.lookup(scope)
        if isinstance(found, Hit):
            if content:
                exchange.answer = [found.answer.text]
            await turn.replay(request, found)
            return
        with found as flight:
            await _ask(turn, route, request, flight, lease)


async def _size(turn: Turn, route: Route, request: ApiRequest) -> tuple[int, int]:
    """Tokens to reserve: of the prompt, and with all answers. Raises ApiError when the prompt is
    longer than the key may send.

    Counting takes 0.3 ms a kilobyte. Where a cheap bound is within the key's limit and far from
    every other one, nothing can depend on the count: the engine's own is what is charged.
    """
    now, principal, counter = turn.now, turn.principal, turn.now.counters[route.name]
    longest, default = (
        now.config.limits.max_prompt_tokens(principal),
        now.config.requests.max_tokens,
    )
    bound = counter.bound(request)
    if bound is not None and (longest is None or bound <= longest):
        most = most_tokens(request, bound, default)
        if counter.estimates:
            return bound, most
        cost = now.dearest[route.name].of(bound, most - bound)
        if turn.services.limiter.ample(principal, tokens=most, cost=cost, session=request.session):
            return bound, most
    prompt = await counter.count(request, longest)
    return prompt, most_tokens(request, prompt, default)


def _bound(now: Configured, route: Route, principal: Principal, request: ApiRequest) -> None:
    """A request without a limit gets the model's own; and where tokens or money are counted, the
    gateway's, or an answer could be longer than what was reserved for it."""
    limit = route.defaults.get("max_completion_tokens") or route.defaults.get("max_tokens")
    if limit is not None:
        request.max_tokens = limit
    elif counts_tokens(now.config.limits, principal):
        request.max_tokens = request.body["max_tokens"] = now.config.requests.max_tokens


async def _ask(turn: Turn, route: Route, request: ApiRequest, flight: Flight, lease: Lease) -> None:
    """Ask a candidate; settle what was used; keep the answer if it may be kept."""
    exchange, now = turn.exchange, turn.now
    # The semantic tier compares answers by their text.
    content, compared = now.config.logs.content, turn.services.cache.semantic is not None
    want_text = request.stream and (content or compared or now.guards.reads_output(turn.policy))
    try:
        response = await turn.open(route, request, want_text=want_text)
    except asyncio.CancelledError:
        # The client left while an engine worked: its prompt was read, and nobody says how far
        # the answer came.
        prompt, _ = now.counters[route.name].afterwards(request)
        exchange.prompt_tokens, exchange.tokens_estimated = prompt, True
        exchange.cost = now.dearest[route.name].of(prompt, 0)
        lease.settle(tokens=prompt, cost=exchange.cost)
        raise
    try:
        async with response:
            if request.stream:
                await _relay(turn, request, response, flight)
                body = flight.body
            else:
                body = await _whole(turn, request, response)
    finally:
        turn.ended(response)
        if content:
            exchange.answer = _texts(request, response)
        _settle(now, route, request, response, exchange)
        used = (exchange.prompt_tokens or 0) + (exchange.completion_tokens or 0)
        lease.settle(tokens=used, cost=exchange.cost)
    flight.put(
        Answer(
            body,
            exchange.prompt_tokens or 0,
            exchange.completion_tokens or 0,
            text="".join(_texts(request, response)) if content or compared else "",
            changed=turn.changed,
        )
    )


def _texts(request: ApiRequest, response: UpstreamResponse) -> list[str]:
    """What the model said, for logs that keep content."""
    if request.stream:
        return response.scan.texts
    try:
        choices = orjson.loads(response.body)["choices"]
        found = [(c.get("message") or {}).get("content") or c.get("text") for c in choices]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # embeddings; an answer that is none
    return [text for text in found if isinstance(text, str)]


async def _relay(
    turn: Turn, request: ApiRequest, response: UpstreamResponse, flight: Flight
) -> None:
    """Events to the client as they come."""
    now, policy, exchange, reply = turn.now, turn.policy, turn.exchange, turn.reply
    scan = response.scan
    probe = now.guards.stream(policy, request)
    changes = probe is not None and probe.changes
    guard = ChunkGuard(lambda: now.guards.stream(policy, request)) if changes else None
    frames = Frames()
    async for data in response.chunks():
        if exchange.ttft_ms is None and scan.text_events:
            exchange.first_text()
        out = data if guard is None else _guarded(frames.feed(data), guard)
        if out:
            flight.write(out)
            await reply.frame(out)
    if guard is not None and (out := _guarded(frames.rest(), guard)):
        await reply.frame(out)  # an end without its empty line
    await reply.end()
    if guard is not None:
        for verdict in guard.verdicts():
            exchange.judged(verdict)
    elif probe is not None:
        probe.feed("".join(scan.texts))
        probe.close()
    if probe is not None or now.guards.reads_output(policy):
        seen = probe if guard is None else guard.guard()
        text = "".join(scan.texts)
        exchange.judged(now.guards.after_stream(policy, seen, text, request, exchange.response_id))


def _guarded(frames: Iterable[Frame], guard: ChunkGuard) -> bytes:
    """The events of one read as they may go out."""
    out: list[bytes] = []
    try:
        for frame in frames:
            if not frame.data or frame.done:
                out.append(frame.raw)
            else:
                out += map(encode, guard.through(frame.json()))
    except MalformedStream as error:
        raise UpstreamError("malformed", f"The engine's stream: {error}.") from None
    return b"".join(out)


async def _whole(turn: Turn, request: ApiRequest, response: UpstreamResponse) -> bytes:
    """The answer in one piece, as it went out."""
    now, policy, exchange = turn.now, turn.policy, turn.exchange
    data = response.body
    if request.kind != "embeddings" and now.guards.reads_output(policy):
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise ApiError("engine_malformed_stream", "The engine's answer is not JSON.") from None
        verdicts = await guard_body(
            now.guards, policy, body, request, response_id=exchange.response_id
        )
        for verdict in verdicts:
            exchange.judged(verdict)
        if any(verdict.action == "redact" for verdict in verdicts):
            data = orjson.dumps(body)
    await turn.reply.whole(200, data)
    return data


def _settle(
    now: Configured,
    route: Route,
    request: ApiRequest,
    response: UpstreamResponse,
    exchange: Exchange,
) -> None:
    """What was really used: the upstream's own count where it gave one."""
    if request.kind != "embeddings" and exchange.completion_tokens is None:
        exchange.tokens_estimated = True
        exchange.completion_tokens = (
            response.scan.completion_tokens()[0]
            if request.stream
            else -(-len(response.body) // 4)  # a quarter of its bytes, as for streams
        )
    if exchange.prompt_tokens is None:
        exchange.prompt_tokens, guessed = now.counters[route.name].afterwards(request)
        exchange.tokens_estimated |= guessed
    price = now.price(response.price)
    exchange.cost = price.of(exchange.prompt_tokens, exchange.completion_tokens or 0)
