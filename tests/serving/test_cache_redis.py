"""The shared tier on a real Redis: two workers, an outage in the middle, purges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from contracts.settings import Settings
from serving.gateway.cache import Answer, Flight, Hit, Purge, ResponseCache
from serving.gateway.cache.purge import purge
from serving.gateway.cache.redis import PREFIX, RedisTier
from serving.gateway.metrics import Metrics
from tests.servers import Server, redis_server, redis_url  # noqa: F401
from tests.serving.cache_requests import answer, config, runs, scope, stream_of, until, value


@asynccontextmanager
async def worker(
    url: str, state: Path | None = None, timeout_ms: int = 1_000
) -> AsyncIterator[tuple[ResponseCache, Metrics]]:
    """On a loaded machine a look-up takes longer than the 25 ms of the default."""
    metrics = Metrics()
    cache = ResponseCache(config(exact={"timeout_ms": timeout_ms}), at(url, state), metrics)
    await cache.start()
    try:
        yield cache, metrics
    finally:
        await cache.close()


def at(url: str, state: Path | None = None) -> Settings:
    """Settings of a machine with a state folder of its own."""
    environ = {} if state is None else {"RATCHET_STATE_DIR": str(state)}
    return replace(Settings.from_env(environ), redis_url=url)


async def fill(cache: ResponseCache, *scopes: object) -> None:
    for one in scopes:
        flight = await cache.lookup(one)  # type: ignore[arg-type]
        assert isinstance(flight, Flight)
        assert flight.put(answer(one.target))  # type: ignore[attr-defined]
    assert cache.redis is not None
    await cache.redis.flush()


async def tier_of(cache: ResponseCache, one: object) -> str:
    found = await cache.lookup(one)  # type: ignore[arg-type]
    if isinstance(found, Flight):
        found.fail()
        return "miss"
    return found.tier


@runs
async def _two_workers(url: str) -> None:
    tenant = f"t{time.monotonic_ns()}"
    one = scope(tenant=tenant, stream=True)
    async with worker(url) as (first, _), worker(url) as (second, metrics):
        flight = await first.lookup(one)
        assert isinstance(flight, Flight)
        kept = Answer(stream_of("Größe\n"), 10, 3, "resp-1", "Größe\n", b'{"cited": [1]}')
        assert flight.put(kept)
        assert first.redis is not None
        await first.redis.flush()
        found = await second.lookup(one)
        assert isinstance(found, Hit)
        assert (found.tier, found.answer) == ("redis", kept)
        assert await tier_of(second, one) == "memory"
        assert await tier_of(second, scope(tenant=f"{tenant}x", stream=True)) == "miss"
        assert value(metrics, "lookups_total", tier="redis", outcome="hit") == 1
        entry = second.memory._entries[one.key]
        assert 3_500 < entry.expires - time.monotonic() <= 3_600  # what is left, not anew


def test_two_workers_share_answers_and_their_end(redis_url: str) -> None:  # noqa: F811
    _two_workers(redis_url)


@runs
async def _purges(url: str, folder: Path) -> None:
    """Two workers on two machines, and the command on a third."""
    name = f"t{time.monotonic_ns()}"
    scopes = [
        scope(tenant=f"{name}-{number % 2}", target=f"{name}-{number // 2}+9", model=f"{name}-m")
        for number in range(4)
    ]
    here = at(url, folder / "c")
    async with worker(url, folder / "a") as (first, _), worker(url, folder / "b") as (second, _):
        await fill(first, *scopes)
        assert [await tier_of(second, one) for one in scopes] == ["redis"] * 4
        assert await purge(here, Purge(release=f"{name}-0"), pause=0) == 2
        await until(lambda: len(first.memory) == len(second.memory) == 2)
        for cache in (first, second):
            assert [await tier_of(cache, one) for one in scopes] == ["miss"] * 2 + ["memory"] * 2
        assert await purge(here, Purge(tenant=f"{name}-1", model=f"{name}-m"), pause=0) == 1
        await until(lambda: len(first.memory) == len(second.memory) == 1)
        for cache in (first, second):
            assert [await tier_of(cache, one) for one in scopes] == ["miss"] * 2 + [
                "memory",
                "miss",
            ]


def test_a_purge_reaches_every_worker(
    redis_url: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.gateway.cache.purges.LOOK_SECONDS", 0.05)
    _purges(redis_url, tmp_path)


@runs
async def _late(url: str, folder: Path) -> None:
    one = scope(tenant=f"t{time.monotonic_ns()}")
    here, what = at(url, folder / "c"), Purge(tenant=one.tenant)
    async with worker(url, folder / "a") as (first, _), worker(url, folder / "b") as (second, _):
        assert first.redis is not None and second.redis is not None
        flight = await second.lookup(one)
        assert isinstance(flight, Flight)
        purging = asyncio.create_task(purge(here, what, pause=0.5))
        while not first.purges:
            await first.redis._look()  # the first hears of it, the second does not
            await asyncio.sleep(0.005)
        assert flight.put(answer("from before"))
        await second.redis.flush()
        assert await tier_of(first, one) == "redis"  # until the second time
        assert await purging == 1
        for cache in (first, second):
            assert cache.redis is not None
            await cache.redis._look()
            assert await tier_of(cache, one) == "miss"


def test_what_a_worker_wrote_before_it_heard_goes_as_well(
    redis_url: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.gateway.cache.purges.LOOK_SECONDS", 3600)
    _late(redis_url, tmp_path)


@runs
async def _outage(server: Server) -> None:
    one, two = scope(tenant="before"), scope(tenant="within")
    async with (
        worker(server.url, timeout_ms=100) as (first, metrics),
        worker(server.url, timeout_ms=100) as (second, _),
    ):
        await fill(first, one)
        server.freeze()  # it takes connections and does not answer
        try:
            began = time.monotonic()
            assert await tier_of(second, one) == "miss"
            assert time.monotonic() - began < 0.5  # one deadline of 100 ms on a busy machine
            assert second.redis is not None and not second.redis.up
            began = time.monotonic()
            for _ in range(100):
                assert await tier_of(second, one) == "miss"
            assert time.monotonic() - began < 0.25  # the breaker: none of them asks
        finally:
            server.thaw()
        server.kill()
        assert await tier_of(first, one) == "memory"
        flight = await first.lookup(two)
        assert isinstance(flight, Flight) and flight.put(answer())  # nothing raises
        assert await tier_of(first, two) == "memory"
        await until(lambda: first.redis is not None and not first.redis.up)
        assert value(metrics, "failures_total", tier="redis", what="get") >= 1
        with pytest.raises((redis.RedisError, OSError)):
            assert first.redis is not None
            await first.redis.purge(Purge(), b"{}")
        server.start()
        await until(lambda: first.redis.up and second.redis.up)  # type: ignore[union-attr]
        assert await tier_of(second, one) == "redis"  # it outlived the crash (appendonly)


def test_an_outage_is_a_miss_within_milliseconds(redis_server: Server) -> None:  # noqa: F811
    _outage(redis_server)


@runs
async def _never_there() -> None:
    async with worker("redis://127.0.0.1:1/0") as (cache, _):
        await cache.lookup(scope())


def test_a_gateway_starts_without_its_redis() -> None:
    _never_there()


@runs
async def _damage(url: str) -> None:
    one = scope(tenant=f"t{time.monotonic_ns()}")
    async with worker(url) as (first, _), worker(url) as (second, _):
        await fill(first, one)
        assert isinstance(first.redis, RedisTier)
        with redis.Redis.from_url(url) as client:
            whole = client.get(first.redis._name(one))
            for damage in (b"", b"x", b"[1,2]\nbody", b'[1,2,"a","b",3]\nbody', b"[]"):
                client.set(first.redis._name(one), damage, keepttl=True)
                assert await tier_of(second, one) == "miss"
            client.set(first.redis._name(one), whole)  # without an end: nobody of ours wrote it
            assert await tier_of(second, one) == "miss"
            client.set(first.redis._name(one), whole, ex=60)
            assert await tier_of(second, one) == "redis"
            assert not any(b"By card" in key for key in client.scan_iter(f"{PREFIX}*"))


def test_a_damaged_entry_is_a_miss(redis_url: str) -> None:  # noqa: F811
    _damage(redis_url)
