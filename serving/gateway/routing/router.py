"""Asks the right upstream, and another one when that fails, until a first byte is there.

One candidate costs a look at its breaker. Of several, those that may be asked are narrowed to the
wanted tier and chosen from by the model's policy. A failed attempt is followed by another one
(elsewhere if possible) while the request's attempts, the gateway's retry budget and the time last.
After the first byte there is no second attempt: what becomes of the answer is told to the breaker
by the response itself, when it is read to its end, breaks or is closed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import orjson

from serving.gateway.api_request import ApiRequest
from serving.gateway.endpoint import Endpoint
from serving.gateway.metrics import Metrics
from serving.gateway.routing import load
from serving.gateway.routing.breaker import STATES, Breaker
from serving.gateway.routing.budget import RetryBudget
from serving.gateway.routing.config import TIERS, Candidate, Policy, Routing, Tier
from serving.gateway.routing.replica import Health, Replica, affine, least_loaded, weighted
from serving.gateway.routing.tiers import Classifier
from serving.gateway.telemetry.spans import Trace
from serving.gateway.upstream import UpstreamClient, UpstreamResponse
from serving.gateway.upstream_errors import FAILURES, Outcome, UpstreamError

log = logging.getLogger("ratchet.gateway.routing")
#: The provider's name of every release's engine, in metrics, spans and the request log.
RELEASE = "release"
#: Polls that an engine may miss before its load is no longer believed.
MISSED_POLLS = 3
#: A moment after which a Retry-After of 0 or a half-open probe is looked at again.
_MOMENT = 0.05


@dataclass(frozen=True)
class Route:
    """A logical model with its replicas."""

    name: str
    replicas: tuple[Replica, ...]
    policy: Policy = "weighted"
    tiers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Attempts:
    """What one request has tried."""

    began: float
    count: int = 0
    failed: tuple[Replica, ...] = ()
    hopeless: tuple[Replica, ...] = ()  # not to be asked again
    error: UpstreamError | None = None


class Router:
    """See the module.

    Args:
        client: speaks to upstreams.
        config: the routing block; ``configure`` swaps it.
        salt: HMAC key that makes a tenant's ``cache_salt``. The same for all workers, or they do
            not share prefixes in the engines.
        environ: where API keys are, by the names in the configuration.
        clock, sleep, random: for tests; ``clock`` is monotonic.

    Raises ConfigError when a key is missing.
    """

    def __init__(
        self,
        client: UpstreamClient,
        metrics: Metrics,
        config: Routing,
        *,
        salt: bytes,
        environ: Mapping[str, str] = os.environ,
        classifier: Classifier | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._client, self._metrics, self._environ = client, metrics, environ
        self._clock, self._sleep, self._random = clock, sleep, random
        self._classifier = classifier or Classifier.load()
        self._salt = lru_cache(4096)(partial(_salt, salt))
        self._health: dict[tuple[str, str], Health] = {}
        self._releases: dict[str, Route] = {}  # by channel
        self._counters: dict[tuple[str, Outcome], Any] = {}
        self.budget = RetryBudget(config.retries.ratio, config.retries.burst)
        self.config = config
        self.configure(config)

    def configure(self, config: Routing) -> None:
        """Swap the configuration. What is known about replicas that stay is kept; requests under
        way end with what they began with. Raises ConfigError, and then nothing has changed."""
        keys = config.keys(self._environ)
        health: dict[tuple[str, str], Health] = {}

        def replica(candidate: Candidate) -> Replica:
            endpoint = config.endpoint(candidate, keys)
            key = (endpoint.url, endpoint.model)
            known = health.get(key) or self._health.get(key) or Health(config.breaker)
            health[key] = known
            return Replica(endpoint, known, candidate)

        self.routes = {
            m.name: Route(m.name, tuple(map(replica, m.candidates)), m.policy, m.tiers, m.defaults)
            for m in config.models
        }
        # A changed policy begins with fresh breakers.
        if config.breaker != self.config.breaker:
            releases = [route.replicas[0].health for route in self._releases.values()]
            for known in (*health.values(), *releases):
                known.breaker = Breaker(config.breaker)
        if config.retries != self.config.retries:
            self.budget = RetryBudget(config.retries.ratio, config.retries.burst)
        self._health, self.config = health, config
        self._metrics.breaker.clear()
        self._metrics.upstream_queue.clear()

    def route_to(self, channel: str, url: str, model: str) -> Route:
        """The route of a channel's release: its engine is the only candidate. What is known of the
        engine is kept while the channel stays with it."""
        timeouts, known = self.config.release_timeouts, self._releases.get(channel)
        health = None
        if known is not None:
            endpoint = known.replicas[0].endpoint
            if (endpoint.url, endpoint.model) == (url, model):
                if endpoint.timeouts is timeouts:
                    return known
                health = known.replicas[0].health
        endpoint = Endpoint(RELEASE, url, model, "vllm", timeouts=timeouts)
        candidate = Candidate(provider=RELEASE, model=model)
        replica = Replica(endpoint, health or Health(self.config.breaker), candidate)
        found = self._releases[channel] = Route(channel, (replica,))
        return found

    def forget(self, channel: str) -> None:
        """Its engine is nobody's candidate any more: it may be gone, and is not polled."""
        self._releases.pop(channel, None)
        self._metrics.upstream_queue.clear()  # the next poll fills it

    async def open(
        self,
        route: Route,
        request: ApiRequest,
        *,
        tenant: str,
        request_id: str,
        trace: Trace | None = None,
        want_text: bool = False,
    ) -> UpstreamResponse:
        """An answer whose first event, or whole body, is here.

        Args:
            request: its body goes up with the model's name, defaults and our own fields in it.
            trace: told of each attempt; what it says of them goes up.

        Raises UpstreamError: that of the last attempt.
        """
        self.budget.request()
        trace = trace or Trace()
        tier: Tier | None = None
        if route.tiers:
            tier = self._classifier.tier(request)
            self._metrics.tiers.labels(tier).inc()
        attempts = _Attempts(self._clock())
        while True:
            if attempts.count:
                await self._sleep(self._backoff(attempts.count))
            while (replica := self._pick(route, request, tenant, tier, attempts)) is None:
                await self._sleep(self._wait(route, attempts))
            health, endpoint = replica.health, replica.endpoint
            probe = health.breaker.claim(self._clock())
            health.in_flight += 1
            attempts.count += 1
            headers = trace.call(endpoint)
            headers["x-request-id"] = request_id
            try:
                response = await self._client.open(
                    endpoint,
                    request.kind,
                    self.payload(route, request, endpoint, tenant),
                    headers,
                    request.stream,
                    hide_usage=not request.include_usage,
                    want_text=want_text,
                )
            except UpstreamError as error:
                self._ended(replica, trace, probe, error.outcome)
                self._failed(replica, attempts, error)
                if not error.elsewhere or not self._again(attempts, error):
                    raise
            except BaseException:
                self._ended(replica, trace, probe, "cancelled")
                raise
            else:
                if probe:
                    # A stream may last for minutes; the replica that began one is back.
                    health.breaker.success(self._clock(), probe)
                    self._show(replica)
                response.on_end = partial(self._ended, replica, trace, False)
                response.tier = tier or ""
                response.price = replica.price
                if not request.stream:
                    response.done()  # all of it is here
                return response

    def payload(self, route: Route, request: ApiRequest, endpoint: Endpoint, tenant: str) -> bytes:
        """The body for one candidate. Usage is always asked for: limits settle at it."""
        body = {**route.defaults, **request.body, "model": endpoint.model}
        if request.kind != "embeddings":
            body["stream"] = request.stream
            if request.stream:
                body["stream_options"] = {
                    **(body.get("stream_options") or {}),
                    "include_usage": True,
                }
        if endpoint.dialect == "vllm":
            body["cache_salt"] = self._salt(tenant)
        else:
            body.pop("cache_salt", None)
        try:
            return orjson.dumps(body)
        except TypeError:  # an integer of more than 64 bits, which JSON allows
            return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")

    async def watch(self) -> None:
        """Read the engines' queues for ever; run as a task."""
        while True:
            try:
                await self._poll()
            except Exception:
                log.exception("reading the engines' queues failed")
            await asyncio.sleep(self.config.poll_seconds)

    async def _poll(self) -> None:
        """Ask each engine once, all at the same time."""
        engines: dict[str, list[Replica]] = {}
        for route in (*self.routes.values(), *self._releases.values()):
            for replica in route.replicas:
                if replica.endpoint.dialect == "vllm":
                    engines.setdefault(replica.endpoint.url, []).append(replica)

        async def ask(url: str, replicas: list[Replica]) -> None:
            text = await self._client.get(f"{url}/metrics", 2 * self.config.poll_seconds)
            found = load.parse(text) if text else None
            for health in {id(r.health): r.health for r in replicas}.values():
                health.heard(found, self._clock())
            gauge = self._metrics.upstream_queue
            gauge.labels(*_labels(replicas[0])).set(found.waiting if found else math.nan)

        await asyncio.gather(*(ask(url, replicas) for url, replicas in engines.items()))

    def _backoff(self, retries: int) -> float:
        """Seconds before a retry: full jitter."""
        policy = self.config.retries
        most: float = min(policy.base_seconds * 2**retries, policy.max_wait_seconds)
        return self._random() * most

    def _pick(
        self,
        route: Route,
        request: ApiRequest,
        tenant: str,
        tier: Tier | None,
        attempts: _Attempts,
    ) -> Replica | None:
        """Whom to ask now; None when nobody may be asked."""
        now, replicas = self._clock(), route.replicas
        if len(replicas) == 1 and not attempts.count:
            return replicas[0] if replicas[0].health.ready(now) else None
        usable = [r for r in replicas if r not in attempts.hopeless and r.health.ready(now)]
        if not usable:
            return None
        group = [r for r in usable if r not in attempts.failed] or usable
        return self._choose(route, request, tenant, _of_tier(group, tier) if tier else group, now)

    def _choose(
        self, route: Route, request: ApiRequest, tenant: str, group: list[Replica], now: float
    ) -> Replica:
        """One of those that may be asked, by the model's policy."""
        if len(group) == 1:
            return group[0]
        if route.policy == "affinity" and request.session:
            key = f"{tenant}\0{request.session}".encode("utf-8", "replace")
            return affine(group, key, self.config.load_factor)
        if route.policy == "weighted":
            return weighted(group, self._random)
        fresh = MISSED_POLLS * self.config.poll_seconds
        return least_loaded(group, self._random, now, fresh)

    def _wait(self, route: Route, attempts: _Attempts) -> float:
        """Seconds until somebody may be asked. Raises when that is too long, or nobody is left."""
        now = self._clock()
        left = [r for r in route.replicas if r not in attempts.hopeless]
        at = min((replica.health.ready_at(now) for replica in left), default=math.inf)
        if attempts.count and at - now <= self.config.retries.max_wait_seconds:
            return max(at - now, _MOMENT)
        if attempts.error is not None:
            raise attempts.error
        # Nobody may be asked, and this request has not been anywhere.
        seconds = at - now if at < math.inf else 1.0  # a probe is under way
        if any(replica.health.not_before > now for replica in left):
            raise UpstreamError(
                "saturated", f"Every engine of '{route.name}' is busy.", retry_after=seconds
            )
        raise UpstreamError(
            "unreachable",
            f"Every engine of '{route.name}' has failed lately and is left alone for a moment.",
            retry_after=seconds,
        )

    def _failed(self, replica: Replica, attempts: _Attempts, error: UpstreamError) -> None:
        """Remember what an attempt came to."""
        attempts.error = error
        attempts.failed += (replica,)
        if error.retry_after is not None:
            health = replica.health
            health.not_before = max(health.not_before, self._clock() + error.retry_after)
        elif error.outcome in ("saturated", "timeout", "denied"):
            # The same again would only add to a full queue, or wait as long once more.
            attempts.hopeless += (replica,)

    def _again(self, attempts: _Attempts, error: UpstreamError) -> bool:
        """Whether there is another attempt to spend."""
        retries = self.config.retries
        if attempts.count >= retries.attempts:
            return False
        if self._clock() - attempts.began >= retries.give_up_seconds:
            return False
        if not self.budget.retry():
            self._metrics.retries_refused.inc()
            return False
        self._metrics.retries.labels(error.outcome).inc()
        return True

    def _ended(self, replica: Replica, trace: Trace, probe: bool, outcome: Outcome) -> None:
        """An attempt, or the answer that it began, has ended."""
        trace.ended(outcome)
        health, breaker = replica.health, replica.health.breaker
        health.in_flight -= 1
        if outcome == "ok" or (outcome == "refused" and probe):  # it lives
            breaker.success(self._clock(), probe)
        elif outcome not in FAILURES:  # else a flood of bad requests would hide failures
            breaker.release(probe)
        else:
            before = breaker.state
            breaker.failure(self._clock(), probe)
            if breaker.state != before:
                log.warning("%s: left alone after failures", replica.name)
                self._show(replica)
        key = (replica.endpoint.provider, outcome)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._metrics.attempts.labels(*key)
        counter.inc()

    def _show(self, replica: Replica) -> None:
        state = STATES[replica.health.breaker.state]
        self._metrics.breaker.labels(*_labels(replica)).set(state)


def _labels(replica: Replica) -> tuple[str, str]:
    return replica.endpoint.provider, replica.endpoint.model


def _of_tier(replicas: list[Replica], tier: Tier) -> list[Replica]:
    """Those of the tier; without any, of the next stronger one, then of the next weaker one."""
    wanted = TIERS.index(tier)
    order: Iterable[Tier] = (*TIERS[wanted:], *reversed(TIERS[:wanted]))
    for name in order:
        found = [replica for replica in replicas if replica.tier_or_standard == name]
        if found:
            return found
    return replicas


def _salt(secret: bytes, tenant: str) -> str:
    """Separates tenants in an engine's prefix cache. 64 hex digits; vLLM takes up to 128."""
    return hmac.new(
        secret, b"cache-salt\0" + tenant.encode("utf-8", "replace"), "sha256"
    ).hexdigest()
