"""The exact cache: what shares an answer, what is kept, for how long, and who waits for whom."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.settings import Settings
from serving.gateway.cache import Answer, Flight, Hit, Purge, ResponseCache, target_of
from serving.gateway.cache.answer import refusal
from serving.gateway.cache.exact import MemoryTier
from serving.gateway.metrics import Metrics
from serving.gateway.routing.config import LogicalModel
from tests.serving.cache_requests import (
    EXACT,
    answer,
    body_of,
    config,
    runs,
    scope,
    stream_of,
    until,
    value,
)

MIB = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Any = None, **blocks: Any) -> tuple[ResponseCache, Metrics]:
    metrics = Metrics()
    more = {"clock": clock} if clock else {}
    return ResponseCache(config(**blocks), Settings.from_env({}), metrics, **more), metrics


# -- who shares an answer -----------------------------------------------------------------------


def test_the_order_of_fields_does_not_matter_and_everything_else_does() -> None:
    same = {"seed": 1, "top_p": 0.5}
    assert scope(**same).key == scope(**dict(reversed(same.items()))).key
    variants = [
        scope(),
        scope("How do I pay ?"),
        scope(tenant="acmf"),
        scope(target="small@2"),
        scope(prompt="answer/v2"),
        scope(guard="v2"),
        scope(model="smal"),
        scope(seed=1),
        scope(seed=2),
        scope(max_tokens=5),
        scope(top_k=3),
        scope(stop=["a"]),
        scope(stop="b"),
        scope(user="a"),
        scope(stream=True),
        scope(stream=True, stream_options={"include_usage": True}),
        scope(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]),
        scope(messages=[{"role": "user", "content": "y"}, {"role": "system", "content": "x"}]),
        scope(messages=[{"role": "user", "content": "xy"}]),
        scope(kind="completions"),
    ]
    assert len({one.key for one in variants}) == len(variants)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.tuples(TEXT, TEXT, TEXT, TEXT), st.tuples(TEXT, TEXT, TEXT, TEXT))
@settings(max_examples=300, deadline=None)
def test_no_text_pretends_to_be_two_fields(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    def key(parts: tuple[str, ...]) -> bytes:
        tenant, target, prompt, guard = parts
        return scope(tenant=f"t{tenant}", target=f"m{target}", prompt=prompt, guard=guard).key

    assert (key(a) == key(b)) == (a == b)


def test_without_a_tenant_or_a_target_there_is_no_key() -> None:
    for name in ("tenant", "target"):
        with pytest.raises(ValueError, match=name):
            scope(**{name: ""})


def test_a_target_changes_with_every_candidate() -> None:
    def target(url: str = "http://a", **more: Any) -> str:
        pair = [{"provider": "p", "model": "x"}, {"provider": "p", "model": "y"}]
        model = LogicalModel.model_validate({"name": "m", "candidates": pair, **more})
        return target_of(model, {"p": url})

    others = [
        target("http://b"),
        target(candidates=[{"provider": "p", "model": "x"}]),
        target(defaults={"top_k": 1}),
        target(policy="affinity"),
    ]
    assert target() == target()
    assert len({target(), *others}) == 5


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("sampling", {"temperature": 0.5}),
        ("sampling", {"temperature": None}),  # the engine's own default is above 0
        ("personal", {"personal": True}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        ("tools", {"messages": [{"role": "tool", "content": "4", "tool_call_id": "a"}]}),
        ("unhashable", {"logit_bias": {"1": 1 << 70}}),
        ("off", {"config": EXACT.model_copy(update={"enabled": False})}),
        ("", {"temperature": 0.5, "seed": 7}),
        ("", {"temperature": None, "temperature_default": 0.0}),
        ("", {"temperature": 1, "config": EXACT.model_copy(update={"any_sampling": True})}),
        ("", {"n": 2}),
    ],
)
def test_what_the_cache_is_not_for(reason: str, given: dict[str, Any]) -> None:
    assert scope(**given).bypass == reason


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        ("", body_of()),
        ("", body_of('it says "finish_reason": "length", {"error": 1}, data: [DONE]')),
        ("truncated", body_of(finish="length")),
        ("truncated", body_of(finish="content_filter")),
        ("truncated", body_of(finish=None)),
        ("truncated", body_of()[:-1]),
        ("tools", body_of(tool_calls=[{"id": "a"}])),
        ("", body_of(tool_calls=[], function_call=None)),
        ("tools", body_of(finish="tool_calls")),
        ("error", b'{"error": {"message": "x"}}'),
        ("too_large", body_of("x" * MIB)),
    ],
)
def test_which_bodies_are_never_kept(reason: str, body: bytes) -> None:
    assert refusal(scope(), Answer(body), MIB) == reason


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        ("", stream_of()),
        ("", stream_of().replace(b"\n", b"\r\n")),
        ("truncated", stream_of(done=False)),
        ("truncated", stream_of(finish="length")),
        ("truncated", stream_of(finish=None)),
        ("error", stream_of(done=False) + b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n'),
        ("truncated", stream_of(done=False) + b"data: [DONE]\n\ndata: {}\n\n"),
    ],
)
def test_which_streams_are_never_kept(reason: str, body: bytes) -> None:
    assert refusal(scope(stream=True), Answer(body), MIB) == reason


def test_all_answers_of_a_request_must_have_ended_well() -> None:
    two = body_of().replace(b"]}", b', {"finish_reason": "length"}]}')
    assert refusal(scope(n=2), Answer(body_of()), MIB) == "truncated"
    assert refusal(scope(n=2), Answer(two), MIB) == "truncated"
    assert refusal(scope(n=2), Answer(two.replace(b"length", b"stop")), MIB) == ""


def test_what_a_guard_changed_is_not_kept() -> None:
    assert refusal(scope(), answer(changed=True), MIB) == "guard"


# -- for how long --------------------------------------------------------------------------------


def test_memory_keeps_what_was_used_last_within_its_bytes() -> None:
    reasons: list[str] = []
    size = answer().size
    tier = MemoryTier(3 * size, reasons.append)
    scopes = [scope(f"question {number}") for number in range(4)]
    for one in scopes[:3]:
        tier.put(one, answer(), 60)
    assert tier.get(scopes[0].key) is not None
    tier.put(scopes[3], answer(), 60)
    assert [tier.get(one.key) is not None for one in scopes] == [True, False, True, True]
    assert (tier.bytes, reasons) == (3 * size, ["full"])
    tier.put(scopes[3], answer("x" * 10_000), 60)  # larger than the tier: not even the old one
    assert (len(tier), tier.bytes) == (2, 2 * size)


def test_memory_accounts_exactly_whatever_happens() -> None:
    clock, rng = Clock(), random.Random(1)
    tier = MemoryTier(20_000, clock=clock)
    scopes = [scope(str(number), tenant=f"t{number % 3}") for number in range(40)]
    for _ in range(3_000):
        one = rng.choice(scopes)
        if rng.random() < 0.5:
            tier.put(one, answer("x" * rng.randrange(2_000)), rng.uniform(0.1, 9))
        else:
            tier.get(one.key)
        clock.now += rng.random()
        assert tier.bytes == sum(entry.size for entry in tier._entries.values()) <= 20_000


@runs
async def test_an_entry_ends_and_a_purge_takes_what_it_names() -> None:
    clock = Clock()
    cache, metrics = make(clock, exact={"ttl_seconds": 10})
    scopes = {
        "old": scope(target="rel-1+3", model="stable"),
        "new": scope(target="rel-2+3", model="stable"),
        "plain": scope(target="small@1", model="small"),
    }

    async def there(name: str) -> bool:
        found = await cache.lookup(scopes[name])
        if isinstance(found, Flight):
            found.fail()
        return isinstance(found, Hit)

    async def fill() -> None:
        for one in scopes.values():
            flight = await cache.lookup(one)
            if isinstance(flight, Flight):
                assert flight.put(answer())

    await fill()
    assert await cache.forget(Purge(release="rel-1")) == 1
    assert [await there(name) for name in scopes] == [False, True, True]
    assert await cache.forget(Purge(model="small", release="rel-2")) == 0
    assert await cache.forget(Purge(tenant="acmf")) == 0
    assert await cache.forget(Purge(model="small")) == 1
    assert [await there(name) for name in scopes] == [False, True, False]
    await fill()
    clock.now += 9.9
    assert await there("old")
    clock.now += 0.2
    assert [await there(name) for name in scopes] == [False, False, False]
    assert value(metrics, "evicted_total", reason="expired") == 3
    assert value(metrics, "bytes") == 0
    await fill()
    assert await cache.forget(Purge(tenant="acme", release="rel-2")) == 1
    assert await cache.forget(Purge(tenant="acme")) == 2
    await fill()
    assert await cache.forget(Purge()) == 3


@runs
async def test_what_is_purged_while_it_is_answered_is_not_kept() -> None:
    cache, metrics = make()
    for what, kept in (
        (Purge(release="small@1"), False),
        (Purge(tenant="acme"), False),
        (Purge(tenant="other"), True),
        (Purge(release="small@2"), True),
    ):
        await cache.forget(Purge())
        flight = await cache.lookup(scope(target="small@1"))
        assert isinstance(flight, Flight)
        await cache.forget(what)
        assert flight.put(answer()) == kept
    assert value(metrics, "refused_total", reason="purged") == 2


@runs
async def test_a_hit_replays_the_bytes_under_its_own_id() -> None:
    cache, metrics = make()
    body = stream_of().replace(b"data: {", b'data: {"id": "resp-20260101-aa", ')
    kept = Answer(body, 10, 3, response_id="resp-20260101-aa")
    flight = await cache.lookup(scope(stream=True))
    assert isinstance(flight, Flight) and flight.put(kept)
    hit = await cache.lookup(scope(stream=True))
    assert isinstance(hit, Hit) and hit.tier == "memory"
    assert hit.answer.replay("resp-20260102-bb") == body.replace(b"0101-aa", b"0102-bb")
    assert isinstance(await cache.lookup(scope()), Flight)  # not streamed: other bytes
    assert value(metrics, "saved_tokens_total", kind="completion") == 3
    assert value(metrics, "lookups_total", tier="memory", outcome="hit") == 1
    assert value(metrics, "lookups_total", tier="memory", outcome="miss") == 2


@runs
async def test_a_stream_is_collected_piece_by_piece_up_to_a_size() -> None:
    cache, metrics = make(exact={"max_entry_bytes": 2_000})
    for text, kept in (("By card.", True), ("x" * 3_000, False)):
        one, whole = scope(text, stream=True), stream_of(text)
        flight = await cache.lookup(one)
        assert isinstance(flight, Flight)
        for at in range(0, len(whole), 50):
            flight.write(whole[at : at + 50])
        assert flight.body == (whole if kept else b"")
        assert flight.put(Answer(flight.body)) == kept
        assert isinstance(await cache.lookup(one), Hit) == kept
    assert value(metrics, "refused_total", reason="too_large") == 1
    bypassed = await cache.lookup(scope(temperature=1))
    assert isinstance(bypassed, Flight)
    bypassed.write(b"data")
    assert bypassed.body == b""


@runs
async def test_a_bypassed_request_neither_waits_nor_leaves_anything() -> None:
    cache, metrics = make()
    for _ in range(2):
        flight = await cache.lookup(scope(temperature=1))
        assert isinstance(flight, Flight)
        assert not flight.put(answer())
    assert len(cache.memory) == 0
    assert value(metrics, "bypass_total", reason="sampling") == 2


# -- who waits for whom --------------------------------------------------------------------------


class Model:
    """Answers when told to; counts who asked."""

    def __init__(self, cache: ResponseCache) -> None:
        self.cache, self.asked, self.tiers = cache, 0, []  # type: ignore[var-annotated]
        self.outcomes: list[Any] = []
        self.gate = asyncio.Event()

    async def ask(self, one: Any) -> str:
        found = await self.cache.lookup(one)
        if isinstance(found, Hit):
            self.tiers.append(found.tier)
            return found.answer.text
        with found as flight:
            self.asked += 1
            outcome = self.outcomes.pop(0) if self.outcomes else answer(f"answer {self.asked}")
            await self.gate.wait()
            if isinstance(outcome, Exception):
                raise outcome
            flight.put(outcome)
            return str(outcome.text)

    def several(self, count: int, one: Any) -> list[asyncio.Task[str]]:
        return [asyncio.create_task(self.ask(one)) for _ in range(count)]


async def settled(tasks: list[asyncio.Task[str]]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)


@runs
async def test_a_hundred_ask_once_and_again_once_when_it_has_ended() -> None:
    clock = Clock()
    cache, metrics = make(clock, exact={"ttl_seconds": 10})
    model = Model(cache)
    tasks = model.several(100, scope())
    await until(lambda: model.asked == 1)
    model.gate.set()
    assert await settled(tasks) == ["answer 1"] * 100
    assert (model.asked, model.tiers) == (1, ["flight"] * 99)
    clock.now += 11  # no herd on expiry
    model.gate.clear()
    tasks = model.several(100, scope())
    await until(lambda: model.asked == 2)
    model.gate.set()
    assert await settled(tasks) == ["answer 2"] * 100
    assert model.asked == 2
    assert value(metrics, "lookups_total", tier="flight", outcome="hit") == 198
    assert len(cache._flights) == 0


@runs
async def test_tenants_do_not_wait_for_each_other() -> None:
    cache, _ = make()
    model = Model(cache)
    tasks = [*model.several(5, scope(tenant="a")), *model.several(5, scope(tenant="b"))]
    await until(lambda: model.asked == 2)
    model.gate.set()
    assert sorted(await settled(tasks)) == ["answer 1"] * 5 + ["answer 2"] * 5


@runs
async def test_when_the_first_fails_the_next_takes_over_and_the_rest_stay() -> None:
    cache, _ = make()
    model = Model(cache)
    model.outcomes = [RuntimeError("the engine broke"), RuntimeError("again")]
    tasks = model.several(10, scope())
    model.gate.set()
    found = await settled(tasks)
    assert [str(one) for one in found[:2]] == ["the engine broke", "again"]
    assert found[2:] == ["answer 3"] * 8
    assert (model.asked, len(cache._flights)) == (3, 0)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@runs
async def test_leaders_and_followers_leave_and_nobody_is_stuck(turns: int) -> None:
    cache, _ = make()
    model = Model(cache)
    tasks = model.several(6, scope())
    await until(lambda: model.asked == 1)
    tasks[3].cancel()  # a follower
    tasks[0].cancel()  # the leader
    for _ in range(turns):  # the next in line leaves in every stage of taking over
        await asyncio.sleep(0)
    tasks[1].cancel()
    model.gate.set()
    found = await settled(tasks)
    assert all(isinstance(found[number], asyncio.CancelledError) for number in (0, 1, 3))
    assert len({found[number] for number in (2, 4, 5)}) == 1
    assert len(cache._flights) == 0


@runs
async def test_what_nobody_else_may_have_releases_all_at_once_and_is_remembered() -> None:
    cache, metrics = make()
    model = Model(cache)
    cut = Answer(body_of("cut", finish="length"), text="cut")
    model.outcomes = [cut] * 30
    tasks = model.several(10, scope())
    model.gate.set()
    assert await settled(tasks) == ["cut"] * 10
    assert (model.asked, model.tiers) == (10, [])
    model.gate.clear()
    tasks = model.several(10, scope())
    await until(lambda: model.asked == 20)  # side by side: no queue for what is not kept
    model.gate.set()
    await settled(tasks)
    assert value(metrics, "refused_total", reason="truncated") == 20


@runs
async def test_nobody_waits_longer_than_configured() -> None:
    cache, metrics = make(exact={"wait_seconds": 0.05})
    model = Model(cache)
    tasks = model.several(3, scope())
    await until(lambda: model.asked == 3)
    model.gate.set()
    await settled(tasks)
    assert model.tiers == []
    assert value(metrics, "lookups_total", tier="flight", outcome="miss") == 2


@runs
async def test_behind_a_leader_that_hangs_somebody_leads_anew() -> None:
    clock = Clock()
    cache, _ = make(clock)
    hanging = await cache.lookup(scope())
    clock.now += 31
    model = Model(cache)
    tasks = model.several(5, scope())
    await until(lambda: model.asked == 1)
    model.gate.set()
    assert await settled(tasks) == ["answer 1"] * 5
    assert isinstance(hanging, Flight)
    hanging.fail()
    assert isinstance(await cache.lookup(scope()), Hit)


@runs
async def test_chaos_ends_with_an_answer_or_an_error_for_everybody() -> None:
    """Cancellations, failures and unkept answers at random; all others get an answer."""
    rng = random.Random(3)
    cache, _ = make(exact={"max_bytes": 1 << 16})

    async def ask(one: Any) -> str:
        found = await cache.lookup(one)
        if isinstance(found, Hit):
            return found.answer.text
        with found as flight:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            roll = rng.random()
            if roll < 0.3:
                raise RuntimeError
            if roll < 0.4:
                flight.put(Answer(body_of(finish="length")))
                return "cut"
            flight.put(answer(one.tenant))
            return str(one.tenant)

    for _ in range(60):
        scopes = [scope(str(rng.randrange(3)), tenant=f"t{rng.randrange(2)}") for _ in range(30)]
        tasks = [asyncio.create_task(ask(one)) for one in scopes]
        while any(not task.done() for task in tasks):
            rng.choice(tasks).cancel()
            await asyncio.sleep(0)
        for one, task in zip(scopes, tasks, strict=True):
            if not task.cancelled() and task.exception() is None:
                assert task.result() in (one.tenant, "cut")
        cache._solo.clear()
        assert len(cache._flights) == 0
        await cache.forget(Purge())
