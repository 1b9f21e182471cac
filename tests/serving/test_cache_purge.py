"""Purges without a shared store: by a file that every worker of a machine looks at."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from contracts.errors import ServiceError
from contracts.settings import Settings
from serving.gateway.cache import Flight, Hit, Purge, ResponseCache, Scope
from serving.gateway.cache.purge import main, purge
from serving.gateway.cache.purges import KEPT, Heard, PurgeFile
from serving.gateway.metrics import Metrics
from tests.conftest import free_port
from tests.serving.cache_requests import answer, config, runs, scope, semantic_cache, until
from tests.serving.test_cache_semantic import learn


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.cache.purges.LOOK_SECONDS", 0.01)


@asynccontextmanager
async def worker(settings: Settings) -> AsyncIterator[ResponseCache]:
    cache = ResponseCache(config(), settings, Metrics())
    await cache.start()
    try:
        yield cache
    finally:
        await cache.close()


async def has(cache: ResponseCache, one: Scope) -> bool:
    found = await cache.lookup(one)
    if isinstance(found, Flight):
        found.fail()
    return isinstance(found, Hit)


def heard_by(workers: Iterable[ResponseCache], purges: int) -> bool:
    return all(cache.purges == purges for cache in workers)


async def fill(cache: ResponseCache, *scopes: Scope) -> None:
    for one in scopes:
        flight = await cache.lookup(one)
        assert isinstance(flight, Flight) and flight.put(answer())


def test_two_workers_forget_what_is_named_and_nothing_else(settings: Settings) -> None:
    scopes = [scope(tenant=t, target=f"{r}+1") for t in ("acme", "other") for r in ("r1", "r2")]

    @runs
    async def check() -> None:
        async with worker(settings) as first, worker(settings) as second:
            both = (first, second)
            cases = (
                (Purge(tenant="acme"), [False, False, True, True]),
                (Purge(release="r1"), [False, True, False, True]),
                (Purge(release="r2", tenant="other"), [True, True, True, False]),
                (Purge(), [False] * 4),
            )
            for told, (what, kept) in enumerate(cases, start=1):
                for cache in both:
                    await fill(cache, *[one for one in scopes if not await has(cache, one)])
                assert await purge(settings, what, pause=0) == 0  # there is no store to count in
                await until(partial(heard_by, both, told))
                for cache in both:
                    assert [await has(cache, one) for one in scopes] == kept

    check()


def test_what_was_announced_before_a_worker_began_does_not_concern_it(settings: Settings) -> None:
    @runs
    async def check() -> None:
        await purge(settings, Purge(), pause=0)
        async with worker(settings) as cache:
            await fill(cache, scope())
            await purge(settings, Purge(tenant="other"), pause=0)
            await until(lambda: cache.purges == 1)
            assert await has(cache, scope())

    check()


def test_an_answer_under_way_is_not_kept_when_its_worker_hears_of_a_purge(
    settings: Settings,
) -> None:
    @runs
    async def check() -> None:
        async with worker(settings) as cache:
            flight = await cache.lookup(scope())
            assert isinstance(flight, Flight)
            await purge(settings, Purge(tenant="acme"), pause=0)
            await until(lambda: cache.purges == 1)
            assert not flight.put(answer()) and not await has(cache, scope())

    check()


def test_the_semantic_tier_in_the_process_forgets_as_well(settings: Settings) -> None:
    @runs
    async def check() -> None:
        async with semantic_cache(settings=settings) as (cache, _):
            for tenant in ("acme", "other"):
                await learn(cache, scope("A?", tenant=tenant))
            assert await has(cache, scope("B?")) and await has(cache, scope("B?", tenant="other"))
            await purge(settings, Purge(tenant="acme"), pause=0)
            await until(lambda: cache.purges == 1)
            assert not await has(cache, scope("B?"))
            assert await has(cache, scope("B?", tenant="other"))

    check()


def test_whoever_missed_some_forgets_everything() -> None:
    heard = Heard()
    told = [Purge(tenant=f"t{n}").announcement() for n in range(3)]
    heard.know(told[2:])
    assert heard.fresh(told) == [Purge(tenant="t1"), Purge(tenant="t0")]  # oldest first
    assert heard.fresh(told) == []
    assert heard.fresh([Purge(tenant="x").announcement() for _ in range(KEPT)]) == [Purge()]
    assert heard.fresh([b"of another version"]) == [Purge()]


def _announce(settings: Settings) -> None:
    for _ in range(20):
        PurgeFile(settings).add(Purge().announcement())


def test_announcements_at_the_same_time_are_all_kept(settings: Settings) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_announce, args=(settings,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    told = PurgeFile(settings).read()
    assert len(told) == len(set(told)) == 80
    for _ in range(2):
        _announce(settings)
    assert len(PurgeFile(settings).read()) == KEPT


@pytest.mark.parametrize("store", ["redis", "qdrant"])
def test_a_store_that_is_away_is_an_error_and_workers_are_told(
    settings: Settings, store: str
) -> None:
    scheme, name = ("redis", "REDIS_URL") if store == "redis" else ("http", "QDRANT_URL")
    environ = {"RATCHET_ROOT": str(settings.root), name: f"{scheme}://127.0.0.1:{free_port()}"}
    away = Settings.from_env(environ)
    with pytest.raises(ServiceError, match="does not answer") as caught:
        asyncio.run(purge(away, Purge(tenant="acme"), pause=0))
    assert "still there" in str(caught.value) and name in str(caught.value)
    assert len(PurgeFile(away).read()) == 1


@pytest.mark.parametrize("arguments", [[], ["--all", "--tenant", "acme"], ["--tenant", ""]])
def test_what_to_forget_is_said_exactly(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
