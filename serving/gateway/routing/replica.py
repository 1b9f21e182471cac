"""One model at one address, as the router sees it: health, load and what it was promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

from serving.gateway.endpoint import Endpoint
from serving.gateway.routing.breaker import Breaker
from serving.gateway.routing.config import BreakerPolicy, Candidate, Tier
from serving.gateway.routing.load import Load


class Health:
    """What is known about one address and model. It outlives reloads of the configuration."""

    __slots__ = ("breaker", "in_flight", "in_flight_then", "load", "load_at", "not_before")

    def __init__(self, policy: BreakerPolicy) -> None:
        self.breaker = Breaker(policy)
        self.in_flight = 0  # from this process
        self.not_before = 0.0  # a Retry-After
        self.load: Load | None = None
        self.load_at = -math.inf
        self.in_flight_then = 0  # when the load was read

    def heard(self, load: Load | None, now: float) -> None:
        """The engine said how busy it is; None when it said nothing."""
        if load is not None:
            self.load, self.load_at, self.in_flight_then = load, now, self.in_flight

    def ready(self, now: float) -> bool:
        """Whether an attempt may begin."""
        return now >= self.not_before and self.breaker.ready(now)

    def ready_at(self, now: float) -> float:
        """When an attempt may begin; not before ``now``. A probe under way counts as never."""
        breaker = self.breaker
        if breaker.state == "half_open" and not breaker.ready(now):
            return math.inf
        return max(now, self.not_before, 0.0 if breaker.state == "closed" else breaker.until)

    def requests(self, now: float, fresh: float) -> float | None:
        """Requests in the engine by its own count, and what this process changed since; None when
        that count is older than ``fresh`` seconds."""
        if self.load is None or now - self.load_at > fresh:
            return None
        return max(0.0, self.load.requests + self.in_flight - self.in_flight_then)


class Replica:
    """A candidate of a logical model."""

    __slots__ = ("endpoint", "health", "name", "price", "seed", "tier", "weight")

    def __init__(self, endpoint: Endpoint, health: Health, candidate: Candidate) -> None:
        self.endpoint, self.health = endpoint, health
        self.weight, self.tier, self.price = candidate.weight, candidate.tier, candidate.price
        self.name = f"{endpoint.url} {endpoint.model}"
        self.seed = blake2b(self.name.encode(), digest_size=16).digest()

    @property
    def tier_or_standard(self) -> Tier:
        return self.tier or "standard"

    def score(self, key: bytes) -> float:
        """Weighted rendezvous hashing: the highest score wins. When a replica goes, only its own
        keys move, and they come back with it."""
        number = int.from_bytes(blake2b(key, key=self.seed, digest_size=8).digest(), "big")
        return -self.weight / math.log((number + 0.5) / 2**64)


def weighted(replicas: Sequence[Replica], random: Callable[[], float]) -> Replica:
    """By weight."""
    at = random() * sum(replica.weight for replica in replicas)
    for replica in replicas:
        at -= replica.weight
        if at < 0:
            return replica
    return replicas[-1]


def least_loaded(
    replicas: Sequence[Replica], random: Callable[[], float], now: float, fresh: float
) -> Replica:
    """The fewest requests per weight, by the engines' own count where all of them have a fresh
    one, else by what this process has under way. Equals are drawn by weight."""
    loads = [replica.health.requests(now, fresh) for replica in replicas]
    if any(load is None for load in loads):
        loads = [replica.health.in_flight for replica in replicas]
    scores = [(load or 0) / replica.weight for load, replica in zip(loads, replicas, strict=True)]
    least = min(scores)
    best = [r for score, r in zip(scores, replicas, strict=True) if score <= least + 1e-9]
    return weighted(best, random)


def affine(replicas: Sequence[Replica], key: bytes, load_factor: float) -> Replica:
    """The replica that has this session's prefix, unless it already has ``load_factor`` times its
    share of what is under way: then the next in the session's own order, which is where the rest
    of a hot set finds its prefixes again."""
    ranked = sorted(replicas, key=lambda replica: replica.score(key), reverse=True)
    total = sum(replica.health.in_flight for replica in replicas) + 1
    weight = sum(replica.weight for replica in replicas)
    for replica in ranked:
        if replica.health.in_flight < math.ceil(load_factor * total * replica.weight / weight):
            return replica
    return ranked[0]
