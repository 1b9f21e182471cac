"""Answers of plain models: what a client asked goes to a candidate, and what comes goes back.

Bytes are relayed as the upstream sent them, unless a guard has to hold text back or change it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from serving.gateway import plain_request
from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.cache.answer import Answer
from serving.gateway.cache.response_cache import Flight, Hit
from serving.gateway.cache.scope import Scope, scope
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.chunks import ChunkGuard, guard_body
from serving.gateway.limits import Lease
from serving.gateway.limits.config import counts_tokens
from serving.gateway.limits.tokens import estimate, most_tokens
from serving.gateway.reply import Reply
from serving.gateway.routing.router import Route
from serving.gateway.services import Configured, Services
from serving.gateway.sse import Frame, Frames, MalformedStream, encode
from serving.gateway.upstream import UpstreamResponse


async def answer(
    services: Services,
    route: Route,
    given: dict[str, Any],
    exchange: Exchange,
    reply: Reply,
) -> None:
    """Answer one request. Raises ApiError; after the first byte, the stream has begun."""
    now, principal = services.now, exchange.principal
    assert principal is not None
    request = plain_request.parse(exchange.kind, route.name, given)
    exchange.stream = request.stream
    request.session = exchange.session = exchange.session or request.session
    limits, counter = now.config.limits, now.counters[route.name]
    if request.kind != "embeddings" and request.max_tokens is None:
        _bound(now, route, principal, request)
    prompt = await counter.count(request, limits.max_prompt_tokens(principal))
    most = most_tokens(request, prompt, now.config.requests.max_tokens)
    lease = await services.limiter.reserve(
        principal,
        tokens=most,
        cost=now.dearest[route.name].of(prompt, most - prompt),
        session=request.session,
    )
    with lease:
        exchange.limits(lease)
        policy = now.policy(principal)
        verdict = await now.guards.check_input(policy, request, exchange.response_id)
        exchange.judged(verdict)
        if verdict.error is not None:
            raise verdict.error
        turn = _Turn(services, now, route, request, principal, policy, exchange, reply)
        found = await services.cache.lookup(turn.scope())
        if isinstance(found, Hit):
            await turn.replay(found)  # the request counts; its tokens and cost do not
            return
        with found as flight:
            await turn.ask(flight, lease, prompt)


def _bound(now: Configured, route: Route, principal: Principal, request: ApiRequest) -> None:
    """A request without a limit gets the model's own; and where tokens or money are counted, the
    gateway's, or an answer could be longer than what was reserved for it."""
    limit = route.defaults.get("max_completion_tokens") or route.defaults.get("max_tokens")
    if limit is not None:
        request.max_tokens = limit
    elif counts_tokens(now.config.limits, principal):
        request.max_tokens = request.body["max_tokens"] = now.config.requests.max_tokens


@dataclass(slots=True)
class _Turn:
    """One admitted request."""

    services: Services
    now: Configured
    route: Route
    request: ApiRequest
    principal: Principal
    policy: str
    exchange: Exchange
    reply: Reply

    def scope(self) -> Scope:
        """What an answer depends on, for the cache."""
        now, temperature = self.now, self.route.defaults.get("temperature", 1.0)
        return scope(
            self.request,
            now.config.cache.exact,
            tenant=self.principal.tenant,
            target=now.targets[self.route.name],
            guard=now.guards.version(self.policy),
            personal=self.policy in now.config.cache.personal,
            temperature=temperature,
        )

    async def replay(self, hit: Hit) -> None:
        """An answer that was given before."""
        self.exchange.cached = "semantic" if hit.tier == "semantic" else "exact"
        body = hit.answer.replay(self.exchange.response_id)
        if self.request.stream:
            await self.reply.frame(body)
            await self.reply.end()
        else:
            await self.reply.whole(200, body)

    async def ask(self, flight: Flight, lease: Lease, prompt: int) -> None:
        """Ask a candidate; settle what was used; keep the answer if it may be kept."""
        exchange, request, now = self.exchange, self.request, self.now
        exchange.trace.asked(request)
        content = now.config.logs.content
        if content:
            exchange.question = "\n".join(request.texts())
        try:
            response = await self.services.router.open(
                self.route,
                request,
                tenant=self.principal.tenant,
                request_id=exchange.response_id,
                headers=exchange.trace.call(),
                want_text=request.stream and (content or now.guards.reads_output(self.policy)),
            )
        except asyncio.CancelledError:
            # The client left while an engine worked: its prompt was read, and nobody says how far
            # the answer came.
            exchange.prompt_tokens, exchange.tokens_estimated = prompt, True
            exchange.cost = now.dearest[self.route.name].of(prompt, 0)
            lease.settle(tokens=prompt, cost=exchange.cost)
            raise
        exchange.prompt_tokens = prompt
        exchange.provider, exchange.attempts = response.endpoint.provider, response.attempts
        exchange.tier = response.tier
        exchange.trace.by(response.endpoint)
        try:
            async with response:
                if request.stream:
                    await _relay(now, self.policy, request, response, exchange, self.reply, flight)
                    body = flight.body
                else:
                    body = await _whole(now, self.policy, request, response, exchange, self.reply)
        finally:
            exchange.trace.answered()
            if content:
                exchange.answer = _texts(request, response)
            if response.scan.finish_reason:
                exchange.trace.finish_reasons = [response.scan.finish_reason]
            _settle(now, request, response, exchange)
            used = (exchange.prompt_tokens or 0) + (exchange.completion_tokens or 0)
            lease.settle(tokens=used, cost=exchange.cost)
        flight.put(
            Answer(
                body,
                exchange.prompt_tokens,
                exchange.completion_tokens or 0,
                changed=exchange.guard in ("redact", "block"),
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
    now: Configured,
    policy: str,
    request: ApiRequest,
    response: UpstreamResponse,
    exchange: Exchange,
    reply: Reply,
    flight: Flight,
) -> None:
    """Events to the client as they come."""
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
        raise ApiError("engine_malformed_stream", f"The engine's stream: {error}.") from None
    return b"".join(out)


async def _whole(
    now: Configured,
    policy: str,
    request: ApiRequest,
    response: UpstreamResponse,
    exchange: Exchange,
    reply: Reply,
) -> bytes:
    """The answer in one piece, as it went out."""
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
    await reply.whole(200, data)
    return data


def _settle(
    now: Configured, request: ApiRequest, response: UpstreamResponse, exchange: Exchange
) -> None:
    """What was really used: the upstream's own count where it gave one."""
    usage = response.usage
    exchange.usage(usage)
    if request.kind != "embeddings" and exchange.completion_tokens is None:
        exchange.tokens_estimated = True
        exchange.completion_tokens = (
            response.scan.completion_tokens()[0]
            if request.stream
            else -(-len(response.body) // 4)  # a quarter of its bytes, as for streams
        )
    if exchange.prompt_tokens is None:
        exchange.prompt_tokens = estimate(request)
    price = now.price(response.price)
    exchange.cost = price.of(exchange.prompt_tokens, exchange.completion_tokens or 0)
