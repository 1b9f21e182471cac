"""The cache as the handler sees it: ``lookup`` gives a Hit, or a Flight that the handler flies.

    found = await cache.lookup(scope)
    if isinstance(found, Hit):
        ...                       # send found.answer.replay(response_id)
    else:
        with found as flight:     # leaving it without an answer lets the next in line try
            ...                   # ask the model, relay; of a stream: flight.write(each piece)
            flight.put(Answer(body or flight.body, ...))

Tiers, nearest first: this process, the same request that is under way already, Redis, and meaning.
A hit or a miss in this process takes microseconds and never gives up the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from contracts.settings import Settings
from serving.gateway.cache import purges
from serving.gateway.cache.answer import Answer, refusal
from serving.gateway.cache.config import Cache
from serving.gateway.cache.exact import MemoryTier
from serving.gateway.cache.personal import personal, said
from serving.gateway.cache.purges import Heard, Purge, PurgeFile
from serving.gateway.cache.redis import RedisTier
from serving.gateway.cache.scope import Scope
from serving.gateway.cache.semantic import SemanticTier, question_of
from serving.gateway.cache.single_flight import Flights, Lead
from serving.gateway.guards.work import SLICE
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.cache")
Tier = Literal["memory", "flight", "redis", "semantic"]
TIERS: tuple[Tier, ...] = ("memory", "flight", "redis", "semantic")
#: Requests whose answer was not kept just now: others like them need not wait for each other.
SOLO_SECONDS = 60.0
MAX_SOLO = 10_000


@dataclass(frozen=True, slots=True)
class Hit:
    """An answer of the same scope."""

    tier: Tier
    answer: Answer


class Flight:
    """The duty to get an answer. ``put`` or ``fail`` ends it, and so does leaving the context;
    what comes first counts. Neither waits nor raises."""

    __slots__ = (
        "_cache", "_lead", "_pieces", "_room", "began", "open", "rival", "scope", "vector",
    )  # fmt: skip

    def __init__(self, cache: ResponseCache, scope: Scope, lead: Lead[Answer] | None) -> None:
        self._cache, self.scope, self._lead = cache, scope, lead
        self.open = True
        self.vector: list[float] | None = None  # of the question, when it was embedded
        self.rival: Answer | None = None  # what the semantic tier would have answered
        self.began = cache.purges  # what was purged later is not stored from this flight
        self._pieces: list[bytes] = []
        self._room = 0 if scope.bypass else cache.config.exact.max_entry_bytes

    def write(self, data: bytes) -> None:
        """Collect a piece of a stream as the client was sent it. What is not for the cache, or
        becomes too large for it, is not collected."""
        if self._room > 0:
            self._room -= len(data)
            if self._room > 0:
                self._pieces.append(data)
            else:
                self._pieces.clear()

    @property
    def body(self) -> bytes:
        """What was collected; b"" when it was too much."""
        return b"".join(self._pieces)

    def put(self, answer: Answer) -> bool:
        """The whole answer as the client was sent it; whether it was kept."""
        if not self.open:
            return False
        self.open = False
        return self._cache.landed(self, self._lead, answer)

    def fail(self) -> None:
        """There is no answer: an error, a break, a client that left."""
        if self.open:
            self.open = False
            self._cache.failed(self._lead)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.fail()


class ResponseCache:
    """All tiers of one worker.

    Args:
        config: the block ``cache``.
        settings: REDIS_URL, QDRANT_URL.
        metrics: see metrics.py, ``ratchet_gateway_cache_*``.
        semantic: for tests; by default what the configuration says.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: Cache,
        settings: Settings,
        metrics: Metrics,
        *,
        semantic: SemanticTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self._metrics, self._clock = config, metrics, clock
        exact = config.exact
        self.memory = MemoryTier(
            exact.max_bytes, lambda why: metrics.cache_evicted.labels(why).inc(), clock
        )
        self._flights: Flights[Answer] = Flights(exact.wait_seconds, clock)
        self._solo: dict[bytes, float] = {}
        self.purges = 0
        self._sharing: set[asyncio.Task[None]] = set()
        self._purged: deque[tuple[int, Purge]] = deque(maxlen=100)
        self._file, self._heard = PurgeFile(settings), Heard()
        self._seen = self._file.signature()
        self._follower: asyncio.Task[None] | None = None
        self.redis: RedisTier | None = None
        if settings.redis_url and exact.enabled:
            self.redis = RedisTier(
                settings.redis_url, exact.timeout_ms, self._told,
                lambda what: metrics.cache_failures.labels("redis", what).inc(),
            )  # fmt: skip
        self.semantic = semantic
        if semantic is None and config.semantic.enabled:
            self.semantic = SemanticTier.of(config.semantic, settings, metrics)
        self._hits = {tier: metrics.cache_lookups.labels(tier, "hit") for tier in TIERS}
        self._misses = {tier: metrics.cache_lookups.labels(tier, "miss") for tier in TIERS}
        self._seconds = {tier: metrics.cache_seconds.labels(tier) for tier in TIERS}
        metrics.cache_bytes.set_function(lambda: self.memory.bytes)
        metrics.cache_entries.set_function(lambda: len(self.memory))

    async def start(self) -> None:
        """An unreachable store is an outage and no error. Raises ConfigError for a semantic tier
        whose model is not installed."""
        self._heard.know(await asyncio.to_thread(self._file.read))
        if self.redis:
            await self.redis.start()
        if self.semantic:
            await self.semantic.start()
        self._follower = asyncio.create_task(self._follow(), name="follow-purges")

    async def close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
        await asyncio.gather(*self._sharing, return_exceptions=True)
        if self.redis:
            await self.redis.close()
        if self.semantic:
            await self.semantic.close()

    def configure(self, config: Cache) -> None:
        """Other sizes, times and thresholds from the next request on. The stores and the embedding
        model stay; a semantic tier that was off at the start stays off."""
        self.config = config
        self.memory.configure(config.exact.max_bytes)
        self._flights.wait_seconds = config.exact.wait_seconds
        if self.redis:
            self.redis.timeout = config.exact.timeout_ms / 1000
        if self.semantic:
            self.semantic.config = config.semantic

    async def lookup(self, scope: Scope) -> Hit | Flight:
        """An answer, or the duty to get one. Waits for the same request that is under way, for
        Redis and for the semantic tier, each for a bounded time."""
        if scope.bypass:
            self._metrics.cache_bypass.labels(scope.bypass).inc()
            return Flight(self, scope, None)
        began = self._clock()
        answer = self.memory.get(scope.key)
        self._seconds["memory"].observe(self._clock() - began)
        if answer is not None:
            return self._hit("memory", answer)
        self._misses["memory"].inc()
        if self._solo and self._solo.get(scope.key, 0.0) > began:
            return Flight(self, scope, None)
        lead = self._flights.lead(scope.key)
        if lead is None:
            found = await self._flights.wait(scope.key)
            self._seconds["flight"].observe(self._clock() - began)
            if isinstance(found, Answer):
                return self._hit("flight", found)
            self._misses["flight"].inc()
            lead = found
        flight = Flight(self, scope, lead)
        if lead is None or (self.redis is None and self.semantic is None):
            return flight
        return await self._far(flight, lead)

    async def _far(self, flight: Flight, lead: Lead[Answer]) -> Hit | Flight:
        """The tiers that are waited for. Whatever ends this early passes the lead on."""
        scope = flight.scope
        try:
            if self.redis is not None:
                began = self._clock()
                found = await self.redis.get(scope)
                self._seconds["redis"].observe(self._clock() - began)
                if found is not None and not self._outdated(flight):
                    self.memory.put(scope, *found)
                    return self._landed("redis", flight, lead, found[0])
                self._misses["redis"].inc()
            if self._means(scope):
                assert self.semantic is not None
                began = self._clock()
                near = await self.semantic.find(scope)
                self._seconds["semantic"].observe(self._clock() - began)
                flight.vector = near.vector
                if near.answer is not None and not near.verify and not self._outdated(flight):
                    return self._landed("semantic", flight, lead, near.answer)
                flight.rival = near.answer
                self._misses["semantic"].inc()
        except BaseException:
            flight.fail()
            raise
        return flight

    def _means(self, scope: Scope) -> bool:
        """Whether the semantic tier is there and for this request."""
        on = self.semantic is not None and self.config.semantic.enabled
        return on and question_of(scope.request) is not None

    # -- purges -----------------------------------------------------------------------------------

    async def forget(self, what: Purge) -> int:
        """Forget what is meant, also what is still being answered. How many answers of this
        process that were."""
        self.purges += 1
        self._purged.append((self.purges, what))
        if self.redis:
            self.redis.forget(what)
        count = await self.memory.purge(what)
        if self.semantic:
            try:
                count += await self.semantic.purge(what)
            except Exception as error:  # a server that is away; whoever purges meets it as well
                log.error("the semantic cache forgot nothing: %s", type(error).__name__)
        return count

    async def _told(self, told: list[bytes]) -> None:
        """These are the purges that were announced."""
        if self._follower is None:  # they were before this worker had anything
            self._heard.know(told)
            return
        for what in self._heard.fresh(told):
            await self.forget(what)

    async def _follow(self) -> None:
        """Look at the file of announcements for ever."""
        while True:
            await asyncio.sleep(purges.LOOK_SECONDS)
            try:
                seen = self._file.signature()
                if seen != self._seen:
                    await self._told(await asyncio.to_thread(self._file.read))
                    self._seen = seen
            except Exception:  # a bug or a broken disk must not end the task
                log.exception("purges cannot be followed")

    def _outdated(self, flight: Flight) -> bool:
        """Whether what it answers was purged since it began; sure for 100 purges."""
        if flight.began == self.purges:
            return False
        if self.purges - flight.began > len(self._purged):
            return True
        return any(
            number > flight.began and what.means(flight.scope) for number, what in self._purged
        )

    # -- what a flight ends with ------------------------------------------------------------------

    def landed(self, flight: Flight, lead: Lead[Answer] | None, answer: Answer) -> bool:
        scope, exact = flight.scope, self.config.exact
        if scope.bypass:
            return False
        why = refusal(scope, answer, exact.max_entry_bytes)
        if not why and self._outdated(flight):
            why = "purged"
        if why:
            self._metrics.cache_refused.labels(why).inc()
            if why != "purged":
                if len(self._solo) >= MAX_SOLO:
                    self._solo.clear()
                self._solo[scope.key] = self._clock() + SOLO_SECONDS
            if lead is not None:
                self._flights.scatter(lead)
            return False
        self._solo.pop(scope.key, None)
        self.memory.put(scope, answer, exact.ttl_seconds)
        self._metrics.cache_stored.labels("memory").inc()
        if lead is not None:
            self._flights.land(lead, answer)
        if self.redis is not None or flight.vector is not None:
            self._share(flight, answer)
        return True

    def _share(self, flight: Flight, answer: Answer) -> None:
        """To the tiers outside of this process, unless it is personal."""
        if len(answer.body) <= SLICE:
            self._shared(flight, answer, personal(said(answer)))
        else:
            task = asyncio.ensure_future(self._share_later(flight, answer))
            self._sharing.add(task)
            task.add_done_callback(self._sharing.discard)

    async def _share_later(self, flight: Flight, answer: Answer) -> None:
        found = await asyncio.to_thread(lambda: personal(said(answer)))
        if not self._outdated(flight):
            self._shared(flight, answer, found)

    def _shared(self, flight: Flight, answer: Answer, is_personal: bool) -> None:
        """The key in Redis is a hash; in Qdrant the question itself stands beside the answer."""
        scope = flight.scope
        if is_personal:
            self._metrics.cache_refused.labels("private").inc()
            return
        if self.redis is not None and self.redis.put(scope, answer, self.config.exact.ttl_seconds):
            self._metrics.cache_stored.labels("redis").inc()
        if self.semantic is not None and flight.vector is not None:
            if personal(question_of(scope.request) or ""):
                self._metrics.cache_refused.labels("private").inc()
            else:
                self.semantic.put(scope, flight.vector, answer, flight.rival)

    def failed(self, lead: Lead[Answer] | None) -> None:
        if lead is not None:
            self._flights.fail(lead)

    def _landed(self, tier: Tier, flight: Flight, lead: Lead[Answer], answer: Answer) -> Hit:
        flight.open = False
        self._flights.land(lead, answer)
        return self._hit(tier, answer)

    def _hit(self, tier: Tier, answer: Answer) -> Hit:
        self._hits[tier].inc()
        self._metrics.cache_saved.labels("prompt").inc(answer.prompt_tokens)
        self._metrics.cache_saved.labels("completion").inc(answer.completion_tokens)
        return Hit(tier, answer)
