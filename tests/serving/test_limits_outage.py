"""The store of the limits goes away in the middle of load, and comes back: both policies."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resources.keys import Key
from serving.gateway.auth import Principal
from serving.gateway.envelope import ApiError
from serving.gateway.limits import Limits
from serving.gateway.limits.lease import Lease
from serving.gateway.limits.redis import RedisLimiter
from serving.gateway.limits.sqlite import SqliteLimiter
from serving.gateway.metrics import Metrics
from tests.servers import Server, redis_server  # noqa: F401


def principal(**limits: Any) -> Principal:
    return Principal(Key(id=uuid.uuid4().hex[:12], tenant="acme", name="x", limits=limits))


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def policy_count(limiter: Any, policy: str) -> float:
    return (
        limiter._metrics.registry.get_sample_value(
            "ratchet_gateway_limits_outage_total", {"policy": policy}
        )
        or 0.0
    )


class Load:
    """One request after another, 16 at a time; what became of each, and how long it took."""

    def __init__(self, limiter: Any, who: Principal) -> None:
        self.limiter, self.who = limiter, who
        self.granted, self.codes, self.seconds = 0, set(), []  # type: ignore[var-annotated]
        self.going = True

    async def one(self) -> None:
        while self.going:
            waited = time.monotonic()
            try:
                lease = await self.limiter.reserve(self.who, tokens=10, cost=0.001)
                lease.settle(tokens=5, cost=0.001)
                self.granted += 1
            except ApiError as error:
                self.codes.add(error.code)
            self.seconds.append(time.monotonic() - waited)
            await asyncio.sleep(0.002)

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        tasks = [asyncio.create_task(self.one()) for _ in range(16)]
        yield
        self.going = False
        await asyncio.gather(*tasks)


async def spent(limiter: Any) -> int:
    """Billionths of this day, as Redis has them."""
    await until(lambda: not limiter._queue)
    keys = [key async for key in limiter._client.scan_iter(f"{limiter._prefix}*:m")]
    return int(await limiter._client.hget(keys[0], "d"))


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_redis_is_killed_and_started_again_under_load(
    redis_server: Server,  # noqa: F811
    policy: Any,
) -> None:
    async def main() -> None:
        limits = Limits(on_outage=policy, timeout_ms=500)
        prefix = f"{uuid.uuid4().hex}:"
        limiter = RedisLimiter(limits, Metrics(), redis_server.url, prefix=prefix)
        await limiter.start()
        load = Load(limiter, principal(spend_day=1000.0, requests_per_minute=10**6))
        async with load.running():
            await until(lambda: load.granted > 100)
            assert not load.codes
            redis_server.kill()
            during = len(load.seconds)
            await until(lambda: policy_count(limiter, policy) > 300)
            waits = sorted(load.seconds[during:])
            # Refused connections fail at once, and the breaker is open after the first.
            assert waits[len(waits) // 2] < 0.05
            assert sum(waits) / len(waits) < 0.1
            if policy == "deny":
                assert load.codes == {"limits_unavailable"}
            else:
                assert not load.codes
            await asyncio.to_thread(redis_server.start)
            await until(lambda: limiter._up)
            after = policy_count(limiter, policy), load.granted
            await until(lambda: load.granted > after[1] + 200)
            assert policy_count(limiter, policy) == after[0]  # it stays up
        assert await spent(limiter) == load.granted * 1_000_000  # each counted, and counted once
        await limiter.close()

    asyncio.run(main())


def test_a_redis_that_hangs_costs_one_deadline(redis_server: Server) -> None:  # noqa: F811
    async def main() -> None:
        limiter = RedisLimiter(
            Limits(timeout_ms=150), Metrics(), redis_server.url, prefix=f"{uuid.uuid4().hex}:"
        )
        await limiter.start()
        who = principal(requests_per_minute=5)
        lease = await limiter.reserve(who, tokens=1, cost=0)
        redis_server.freeze()
        try:
            began = time.monotonic()
            found = [await limiter.reserve(who, tokens=1, cost=0) for _ in range(5)]
            assert time.monotonic() - began < 5 * 0.15  # one waited, the others did not
            # The worker enforces the limit alone meanwhile.
            with pytest.raises(ApiError):
                await limiter.reserve(who, tokens=1, cost=0)
            lease.settle(tokens=1, cost=0)
            for one in found:
                one.settle(tokens=1, cost=0)
        finally:
            redis_server.thaw()
        await until(lambda: limiter._up)
        await limiter.flush()
        await limiter.close()

    asyncio.run(main())


def test_redis_forgets_its_scripts(redis_server: Server) -> None:  # noqa: F811
    async def main() -> None:
        limiter = RedisLimiter(
            Limits(timeout_ms=5000), Metrics(), redis_server.url, prefix=f"{uuid.uuid4().hex}:"
        )
        await limiter.start()
        who = principal(concurrent=1)
        for _ in range(3):
            lease = await limiter.reserve(who, tokens=1, cost=0)
            assert isinstance(lease, Lease)
            await limiter._client.script_flush()
            lease.settle(tokens=1, cost=0)
            await limiter.flush()
        assert policy_count(limiter, "allow") == 0
        await limiter.close()

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_a_gateway_starts_while_redis_is_down(policy: Any) -> None:
    async def main() -> None:
        limits = Limits(on_outage=policy)
        limiter = RedisLimiter(limits, Metrics(), "redis://127.0.0.1:1/0")
        await limiter.start()
        waiting = limiter.reserve(principal(concurrent=1), tokens=1, cost=0)
        if policy == "allow":
            assert (await waiting).open
        else:
            with pytest.raises(ApiError) as caught:
                await waiting
            assert caught.value.code == "limits_unavailable"
            assert caught.value.headers["retry-after"] == "1"
        await limiter.close()

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_sqlite_is_locked_and_free_again(tmp_path: Path, policy: Any) -> None:
    async def main() -> None:
        limits = Limits(on_outage=policy, timeout_ms=100)
        limiter = SqliteLimiter(limits, Metrics(), tmp_path / "limits.db")
        await limiter.start()
        load = Load(limiter, principal(spend_day=1000.0))
        async with load.running():
            await until(lambda: load.granted > 50)
            blocker = sqlite3.connect(tmp_path / "limits.db", isolation_level=None, timeout=10)
            blocker.execute("BEGIN IMMEDIATE")
            await until(lambda: policy_count(limiter, policy) > 300)
            assert load.codes == ({"limits_unavailable"} if policy == "deny" else set())
            blocker.execute("ROLLBACK")
            blocker.close()
            await until(lambda: limiter._up)
            after = load.granted
            await until(lambda: load.granted > after + 50)
        await limiter.close()
        with sqlite3.connect(tmp_path / "limits.db") as db:
            ((state,),) = db.execute("SELECT state FROM account WHERE name LIKE '%:k:%'").fetchall()
        assert f'"spent":[{int(time.time() // 86400)},{load.granted * 1_000_000},' in state

    asyncio.run(main())
