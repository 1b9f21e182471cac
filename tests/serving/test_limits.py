"""Limits: one contract for memory, SQLite and Redis, and the arithmetic below all three."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.settings import Settings
from resources.keys import Key, KeyLimits
from serving.gateway.auth import Principal
from serving.gateway.envelope import ApiError
from serving.gateway.limits import Limits, config, open_limiter
from serving.gateway.limits.account import PARTS, Account, Calendar, StoredAccount
from serving.gateway.limits.config import Rules
from serving.gateway.limits.journal import SpendJournal
from serving.gateway.limits.memory import MemoryLimiter
from serving.gateway.limits.redis import RedisLimiter
from serving.gateway.limits.sqlite import SqliteLimiter
from serving.gateway.metrics import Metrics
from tests.servers import redis_server, redis_url  # noqa: F401

BACKENDS = ["memory", "sqlite", "redis"]
Make = Callable[..., Any]


def principal(tenant: str = "acme", **limits: Any) -> Principal:
    return Principal(Key(id=uuid.uuid4().hex[:12], tenant=tenant, name="x", limits=limits))


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Limiters of one backend that share what that backend can share."""
    backend, prefix = request.param, f"test-{uuid.uuid4().hex}:"
    if backend == "redis":
        url = request.getfixturevalue("redis_url")

    def build(limits: Limits | None = None, **more: Any) -> Any:
        # A deadline that a loaded test machine meets; outages have tests of their own.
        limits = limits or Limits(timeout_ms=5000, **more)
        metrics = Metrics()
        if backend == "memory":
            return MemoryLimiter(limits, metrics, SpendJournal(tmp_path / "spend.db"))
        if backend == "sqlite":
            return SqliteLimiter(limits, metrics, tmp_path / "limits.db")
        return RedisLimiter(limits, metrics, url, prefix=prefix)

    build.backend = backend  # type: ignore[attr-defined]
    return build


def run(limiter: Any, work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        await limiter.start()
        try:
            return await work(limiter)
        finally:
            await limiter.close()
            outage = limiter._metrics.limits_outage.collect()[0].samples
            assert not outage, "a failing store was covered by the policy for outages"
            assert limiter._metrics.settlements_dropped._value.get() == 0

    return asyncio.run(main())


async def flush(limiter: Any) -> None:
    if hasattr(limiter, "flush"):
        await limiter.flush()


def test_ample_is_far_from_every_limit_with_what_is_reserved(make: Make) -> None:
    knows = make.backend == "memory"  # type: ignore[attr-defined]
    free, few = principal(), principal(tokens_per_minute=1000, requests_per_minute=5)
    money = principal(spend_day=10, spend_month=1000)

    async def work(limiter: Any) -> None:
        assert limiter.ample(free, tokens=10**9, cost=1e6)  # nothing to be far from
        assert limiter.ample(few, tokens=100, cost=1.0) is knows
        assert not limiter.ample(few, tokens=101, cost=0.0)
        assert limiter.ample(money, tokens=10**9, cost=1.0) is knows
        assert not limiter.ample(money, tokens=1, cost=1.01)
        first = await limiter.reserve(few, tokens=60, cost=0.0)
        second = await limiter.reserve(money, tokens=1, cost=0.6)
        assert not limiter.ample(few, tokens=41, cost=0.0)
        assert not limiter.ample(money, tokens=1, cost=0.5)
        first.settle(tokens=10, cost=0.0)
        second.settle(tokens=1, cost=0.1)
        assert limiter.ample(few, tokens=90, cost=0.0) is knows
        assert limiter.ample(money, tokens=1, cost=0.9) is knows

    run(make(), work)


async def refusal(waiting: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await waiting
    return caught.value


async def eventually(again: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """The first answer that is not a refusal."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await again()
        except ApiError:
            assert time.monotonic() < deadline, "it was refused for too long"
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"requests_per_minute": 30}, 30),
        ({"tokens_per_minute": 1000}, 10),  # of 100 tokens each
        ({"concurrent": 7}, 7),
        ({"spend_day": 2.0}, 20),  # of 0.1 each
        ({"spend_month": 1.5}, 15),
        ({"session_tokens": 500}, 5),
    ],
)
def test_a_hundred_at_once_never_exceed_a_limit(
    make: Make, limits: dict[str, Any], allowed: int
) -> None:
    who = principal(**limits)

    async def work(limiter: Any) -> None:
        leases = await asyncio.gather(
            *(limiter.reserve(who, tokens=100, cost=0.1, session="s") for _ in range(100)),
            return_exceptions=True,
        )
        refused = [found for found in leases if isinstance(found, ApiError)]
        assert len(leases) - len(refused) == allowed
        code = "budget_exceeded" if "spend" in str(limits) else "rate_limit_exceeded"
        assert {error.code for error in refused} == {code}
        assert all(int(error.headers["retry-after"]) >= 1 for error in refused)
        for found in leases:
            if not isinstance(found, ApiError):
                found.settle(tokens=0, cost=0)

    run(make(), work)


def test_two_workers_share_a_limit(make: Make) -> None:
    if make.backend == "memory":  # type: ignore[attr-defined]
        return  # it is for one worker: test_budgets_survive_a_restart is what it can
    who = principal(tokens_per_minute=1000)

    async def work(first: Any) -> None:
        second = make()
        await second.start()
        leases = await asyncio.gather(
            *((first, second)[i % 2].reserve(who, tokens=100, cost=0) for i in range(60)),
            return_exceptions=True,
        )
        assert sum(not isinstance(found, ApiError) for found in leases) == 10
        await second.close()

    run(make(), work)


def test_settling_gives_back_or_adds_and_counts_once(make: Make) -> None:
    who = principal(tokens_per_minute=1000, spend_day=10.0)

    async def work(limiter: Any) -> None:
        lease = await limiter.reserve(who, tokens=900, cost=9.0)
        assert (await refusal(limiter.reserve(who, tokens=200, cost=0))).code
        lease.settle(tokens=100, cost=1.0)
        lease.settle(tokens=0, cost=0.0)  # no second time
        await flush(limiter)
        more = await limiter.reserve(who, tokens=900, cost=9.0)  # 100 + 900, 1 + 9
        assert (await refusal(limiter.reserve(who, tokens=1, cost=0))).code
        more.settle(tokens=950, cost=8.5)  # above what was reserved: 1050 of 1000
        await flush(limiter)
        error = await refusal(limiter.reserve(who, tokens=1, cost=0))
        assert error.code == "rate_limit_exceeded"

    run(make(), work)


def test_a_lease_that_is_left_or_lost_is_returned_at_zero(make: Make) -> None:
    who = principal(tokens_per_minute=1000, concurrent=1, spend_day=1.0)

    async def work(limiter: Any) -> None:
        for _ in range(3):
            with await eventually(lambda: limiter.reserve(who, tokens=1000, cost=1.0)):
                assert (await refusal(limiter.reserve(who, tokens=1, cost=0))).code
        lease = await eventually(lambda: limiter.reserve(who, tokens=1000, cost=1.0))
        del lease
        gc.collect()
        await eventually(lambda: limiter.reserve(who, tokens=1000, cost=1.0))

    run(make(), work)


def test_what_a_crash_held_comes_back(make: Make) -> None:
    if make.backend == "memory":  # type: ignore[attr-defined]
        return  # its reservations are this process's memory; see the restart below
    who = principal(tokens_per_minute=1000, concurrent=1, spend_day=1.0, session_tokens=1000)

    async def main() -> None:
        crashing, other = make(lease_seconds=0.8), make(lease_seconds=0.8)
        await crashing.start()
        await other.start()
        lease = await crashing.reserve(who, tokens=1000, cost=1.0)
        began = time.monotonic()
        # Renewed for as long as its worker lives, and the store's clock cannot be turned.
        while time.monotonic() - began < 1.2:
            assert (await refusal(other.reserve(who, tokens=1, cost=0))).code
            await asyncio.sleep(0.05)
        for task in crashing._tasks:  # as SIGKILL: nothing is renewed or settled any more
            task.cancel()
        crashing._loop = None
        await eventually(lambda: other.reserve(who, tokens=1000, cost=1.0))
        assert lease.open
        await crashing._disconnect()
        await other.close()

    asyncio.run(main())


def test_a_lease_settled_after_it_expired_still_counts(make: Make) -> None:
    if make.backend == "memory":  # type: ignore[attr-defined]
        return
    who = principal(spend_day=1.0)

    async def work(limiter: Any) -> None:
        lease = await limiter.reserve(who, tokens=1, cost=0.6)
        for task in limiter._tasks[:1]:  # no renewals: as a worker that was frozen
            task.cancel()
        other = await eventually(lambda: limiter.reserve(who, tokens=1, cost=1.0))
        other.settle(tokens=0, cost=0.0)
        lease.settle(tokens=1, cost=0.7)
        await flush(limiter)
        assert (await refusal(limiter.reserve(who, tokens=1, cost=0.4))).code == "budget_exceeded"
        (await limiter.reserve(who, tokens=1, cost=0.3)).settle(tokens=0, cost=0)

    run(make(lease_seconds=0.3), work)


def test_budgets_survive_a_restart(make: Make) -> None:
    who = principal(spend_day=1.0, spend_month=5.0)
    shared = Limits(timeout_ms=5000, tenants={"acme": {"spend_day": 1.5}})

    async def spend(limiter: Any) -> None:
        (await limiter.reserve(who, tokens=1, cost=0.9)).settle(tokens=1, cost=0.9)
        await limiter.reserve(who, tokens=1, cost=0.05)  # never settled

    async def again(limiter: Any) -> None:
        error = await refusal(limiter.reserve(who, tokens=1, cost=0.2))
        assert error.code == "budget_exceeded"
        assert 1 <= int(error.headers["retry-after"]) <= 86_400
        other = principal()  # of the same tenant, whose budget is shared
        assert (await refusal(limiter.reserve(other, tokens=1, cost=0.7))).code == "budget_exceeded"
        await limiter.reserve(other, tokens=1, cost=0.5)

    run(make(shared), spend)
    run(make(shared), again)


def test_a_clock_that_is_set_mints_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    who = principal(requests_per_minute=2, spend_day=1.0)

    async def work(limiter: Any) -> None:
        for _ in range(2):
            (await limiter.reserve(who, tokens=1, cost=0.5)).settle(tokens=1, cost=0.5)
        await flush(limiter)
        real = time.time
        # A day ahead is another day for SQLite, whose clock is this machine's: there only back.
        steps = [-3600, -86_400 * 40]
        if make.backend != "sqlite":  # type: ignore[attr-defined]
            steps += [3600, 86_400, 86_400 * 40]
        for step in steps:
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda step=step: real() + step)
                assert (await refusal(limiter.reserve(who, tokens=1, cost=0.0))).code
                assert (
                    await refusal(limiter.reserve(principal(spend_day=0.0), tokens=1, cost=0.1))
                ).code

    run(make(), work)


def test_a_window_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SESSION_SECONDS", 0.5)
    who = principal(session_tokens=100)

    async def work(limiter: Any) -> None:
        began = time.monotonic()
        (await limiter.reserve(who, tokens=100, cost=0, session="a")).settle(tokens=100, cost=0)
        await flush(limiter)
        error = await refusal(limiter.reserve(who, tokens=1, cost=0, session="a"))
        assert error.headers["retry-after"] == "1"
        await limiter.reserve(who, tokens=100, cost=0, session="b")  # another session
        await eventually(lambda: limiter.reserve(who, tokens=100, cost=0, session="a"))
        assert time.monotonic() - began >= 0.5

    run(make(), work)


def test_requests_without_a_session_share_one(make: Make) -> None:
    who = principal(session_tokens=100)

    async def work(limiter: Any) -> None:
        lease = await limiter.reserve(who, tokens=60, cost=0)
        error = await refusal(limiter.reserve(who, tokens=60, cost=0))
        assert "session" in error.message
        lease.settle(tokens=60, cost=0)

    run(make(), work)


def test_headers_and_requests_that_can_never_fit(make: Make) -> None:
    who = principal(requests_per_minute=10, tokens_per_minute=1000)

    async def work(limiter: Any) -> None:
        lease = await limiter.reserve(who, tokens=300, cost=0)
        assert dict(lease.headers()) == {
            b"x-ratelimit-limit-requests": b"10",
            b"x-ratelimit-remaining-requests": b"9",
            b"x-ratelimit-reset-requests": b"60s",
            b"x-ratelimit-limit-tokens": b"1000",
            b"x-ratelimit-remaining-tokens": b"700",
            b"x-ratelimit-reset-tokens": b"60s",
        }
        error = await refusal(limiter.reserve(who, tokens=1001, cost=0))
        assert error.code == "rate_limit_exceeded"
        assert "retry-after" not in error.headers
        free = await limiter.reserve(principal(), tokens=10**9, cost=1e6)
        assert free.headers() == []
        free.settle(tokens=1, cost=1.0)

    run(make(), work)


def test_limits_of_a_key_that_change_hold_at_once(make: Make) -> None:
    key = Key(id=uuid.uuid4().hex[:12], tenant="acme", name="x")

    async def work(limiter: Any) -> None:
        limited = key.model_copy(update={"limits": KeyLimits(requests_per_minute=1)})
        await limiter.reserve(Principal(key), tokens=1, cost=0)
        await limiter.reserve(Principal(limited), tokens=1, cost=0)
        assert (await refusal(limiter.reserve(Principal(limited), tokens=1, cost=0))).code
        limiter.configure(Limits(timeout_ms=5000, keys=KeyLimits(concurrent=1)))
        other = Principal(key)
        held = await eventually(lambda: limiter.reserve(other, tokens=1, cost=0))
        assert held.open

    run(make(), work)


# -- the arithmetic ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 15), st.integers(1, 30)), min_size=1, max_size=60),
)
def test_a_limit_holds_in_every_window(limit: int, steps: list[tuple[float, int]]) -> None:
    account, rules = Account(60.0), Rules("key", tokens=limit)
    now, admitted = 1000.0, []
    for wait, tokens in steps:
        now += wait
        refused = account.refuse(rules, now, now, Calendar().at(now), tokens, 0)
        if refused is None:
            account.take(now, tokens, 0)
            admitted.append((now, tokens))
        elif refused.retry_after is not None:  # it is true when it says when to come again
            later = now + refused.retry_after + 1e-6
            state = StoredAccount(account).dump(now)
            copy = StoredAccount.load(state, 60.0, now).account
            assert copy.refuse(rules, later, later, Calendar().at(later), tokens, 0) is None
    for start, _ in admitted:
        assert sum(tokens for at, tokens in admitted if start <= at < start + 60) <= limit


def test_who_uses_all_gets_nearly_all() -> None:
    account, rules, got, now = Account(60.0), Rules("key", requests=60), 0, 0.0
    while now < 6000:
        if account.refuse(rules, now, now, Calendar(), 0, 0) is None:
            account.take(now, 0, 0)
            got += 1
        now += 0.25
    assert PARTS / (PARTS + 1) * 0.98 <= got / 6000 <= 1.02


@given(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)))
def test_days_and_months_are_utc(when: datetime) -> None:
    moment = when.replace(tzinfo=UTC)
    calendar = Calendar().at(moment.timestamp())
    assert calendar.month == moment.year * 12 + moment.month - 1
    assert calendar.day == (moment.date() - datetime(1970, 1, 1).date()).days
    ends = moment.timestamp() + calendar.month_left(moment.timestamp())
    after = datetime.fromtimestamp(ends + 1, UTC)
    assert after.day == 1 or after.timestamp() - moment.timestamp() < 3


STEP = st.tuples(
    st.integers(0, 2),  # which session
    st.integers(0, 60),  # tokens reserved
    st.integers(0, 60),  # money reserved
    st.none() | st.tuples(st.integers(0, 90), st.integers(0, 90)),  # settled at; None: held
)


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEP, min_size=5, max_size=40), roomy=st.booleans())
def test_memory_sqlite_and_redis_decide_alike(
    tmp_path_factory: pytest.TempPathFactory,
    redis_url: str,  # noqa: F811
    steps: list[Any],
    roomy: bool,
) -> None:
    """All steps fall into one window, so only the arithmetic can differ."""
    more = 10 if roomy else 1
    who = principal(
        requests_per_minute=25,
        tokens_per_minute=300 * more,
        concurrent=6 * more,
        session_tokens=150 * more,
        spend_day=0.3 * more,
        spend_month=0.35 * more,
    )
    limits = Limits(timeout_ms=5000, tenants={"acme": {"spend_day": 0.32 * more}})
    path = tmp_path_factory.mktemp("limits") / "limits.db"

    async def decisions(limiter: Any) -> list[Any]:
        await limiter.start()
        found, held = [], []
        for session, tokens, money, settled in steps:
            try:
                lease = await limiter.reserve(
                    who, tokens=tokens, cost=money / 1000, session=str(session)
                )
            except ApiError as error:
                found.append((error.code, error.message))
                continue
            found.append(lease.remaining)
            if settled is None:
                held.append(lease)
            else:
                lease.settle(tokens=settled[0], cost=settled[1] / 1000)
                await flush(limiter)
        for lease in held:
            lease.settle(tokens=0, cost=0)
        await limiter.close()
        return found

    def decided(limiter: Any) -> list[Any]:
        return asyncio.run(decisions(limiter))

    expected = decided(MemoryLimiter(limits, Metrics()))
    assert decided(SqliteLimiter(limits, Metrics(), path)) == expected
    prefix = f"test-{uuid.uuid4().hex}:"
    assert decided(RedisLimiter(limits, Metrics(), redis_url, prefix=prefix)) == expected


def test_the_script_knows_the_calendar(redis_url: str) -> None:  # noqa: F811
    import redis

    text = (Path(config.__file__).parent / "redis.lua").read_text()
    script = (
        text + "local f = {} for i, d in ipairs(ARGV) do f[i] = month_of(tonumber(d)) end return f"
    )
    days = [*range(0, 90_000, 17), 18321, 18322, 19782, 19783, 47540, 47541]
    with redis.Redis.from_url(redis_url) as client:
        found = client.eval(script, 0, *days)
    assert found == [Calendar().at(day * 86_400.0).month for day in days]


def test_a_boot_ends_windows_and_leases_and_keeps_money() -> None:
    stored = StoredAccount.load(None, 60.0, 5000.0)
    stored.account.roll(Calendar().at(1e9))
    part = stored.account.take(5000.0, 70, 3)
    stored.leases["x"] = [5060.0, part, 70, 3]
    stored.account.day_spent = 9
    after = StoredAccount.load(stored.dump(5000.0), 60.0, 12.0)  # the clock began anew
    assert (after.account.tokens.total, after.account.live, after.account.held) == (0, 0, 0)
    assert after.account.day_spent == 9


def test_which_backend_is_opened(tmp_path: Path) -> None:
    settings = Settings.from_env({"RATCHET_STATE_DIR": str(tmp_path)})
    by_address = Settings.from_env({"REDIS_URL": "redis://127.0.0.1:1/0"})
    metrics = Metrics
    assert isinstance(open_limiter(Limits(), settings, metrics()), MemoryLimiter)
    assert isinstance(open_limiter(Limits(), settings, metrics(), workers=2), SqliteLimiter)
    assert isinstance(open_limiter(Limits(), by_address, metrics()), RedisLimiter)
    with pytest.raises(Exception, match="REDIS_URL"):
        open_limiter(Limits(backend="redis"), settings, metrics())


def test_sessions_do_not_pile_up() -> None:
    now = [1000.0]
    limiter = MemoryLimiter(Limits(), Metrics(), monotonic=lambda: now[0])
    who = principal(session_tokens=100)
    for number in range(500):
        limiter.take(who, tokens=1, cost=0, session=str(number)).settle(tokens=1, cost=0)
    assert len(limiter._sessions) == 500
    now[0] += 400
    for number in range(300):
        limiter.take(who, tokens=1, cost=0, session=f"later {number}")
    assert len(limiter._sessions) == 300
