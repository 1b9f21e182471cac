"""The semantic tier: what is compared besides vectors, whose answers are found, what is verified.

Vectors come from a table of the test's own, so that the worst case can be had: texts that all have
the same vector (CacheAttack). One test uses the real model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.settings import Settings
from serving.gateway.cache import Answer, Flight, Hit, Purge, ResponseCache
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.meaning import fingerprint
from serving.gateway.cache.semantic import question_of, wanted
from serving.gateway.cache.vectors import EdgeVectors, ServerVectors, VectorStore, open_vectors
from serving.gateway.metrics import Metrics
from tests.serving.cache_requests import (
    Table,
    answer,
    config,
    edge,
    runs,
    scope,
    semantic_cache,
    value,
)


def server() -> VectorStore:
    """The calls of the server adapter, answered by qdrant-client itself."""
    from qdrant_client import QdrantClient

    return ServerVectors(QdrantClient(":memory:"), "cache")


BACKENDS = pytest.mark.parametrize("store", [edge, server])


async def learn(cache: ResponseCache, one: Any, said: Answer | None = None) -> None:
    flight = await cache.lookup(one)
    assert isinstance(flight, Flight)
    assert flight.put(said or answer(one.tenant))
    assert cache.semantic is not None
    await cache.semantic.flush()


async def found(cache: ResponseCache, one: Any) -> str | None:
    """The text that the semantic tier answers with; None for a miss."""
    got = await cache.lookup(one)
    if isinstance(got, Flight):
        got.fail()
        return None
    assert got.tier == "semantic"
    return got.answer.text


# -- what may not differ -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is the fee for 100 EUR?", "What is the fee for 1000 EUR?"),
        ("Is it open from 5 to 7?", "Is it open from 7 to 5?"),
        ("I want two cards", "I want three cards"),
        ("Take 5% of it", "Take 5 of it"),
        ("Can I cancel?", "Can't I cancel?"),
        ("Why was it charged?", "Why was it not charged?"),
        ("I got my card", "I never got my card"),
        ("I dont have a PIN", "I do have a PIN"),
        ("What does `foo_bar` do?", "What does `foo_baz` do?"),
        ("Set max_tokens higher", "Set max_time higher"),
        ("Where is getUser called?", "Where is setUser called?"),
        ("Show order A-17", "Show order A-18"),
        ("Read docs/gateway.md", "Read docs/guards.md"),
        ("Say 'yes' to all", "Say 'now' to all"),
        ("Pay in USD", "Pay in GBP"),
        ("Pay 5 $", "Pay 5 €"),
        ("Wie lösche ich das?", "Wie löste ich das?"),
        ("Is раураl down?", "Is paypal down?"),
    ],
)
def test_these_never_share_an_answer(a: str, b: str) -> None:
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I pay?", "how can i pay"),
        ("I do not see my card", "I don\u2019t see my card"),
        ("I have two cards", "I've got 2 cards"),
        ("What's the fee of the customers' cards?", "what is the fee of customer cards"),
        ("It costs 5 % more", "It costs 5% more"),
    ],
)
def test_these_may(a: str, b: str) -> None:
    assert fingerprint(a) == fingerprint(b)


def test_only_a_single_question_is_eligible() -> None:
    system, user = {"role": "system", "content": "x"}, {"role": "user", "content": "Why?"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    said = {"role": "assistant", "content": "Because."}

    def asked(*messages: Any, **more: Any) -> str | None:
        return question_of(scope(messages=list(messages), **more).request)

    assert asked(user) == asked(system, user) == asked(system, parts) == "Why?"
    for other in ([user, said, user], [user, user], [user, system], [system], [user, said]):
        assert asked(*other) is None
    assert asked(user, n=2) is None
    assert asked({"role": "user", "content": "x" * 255}) is None  # the model cuts what is longer
    assert question_of(scope(kind="completions").request) is None


def test_without_a_tenant_there_is_no_query() -> None:
    with pytest.raises(ValueError, match="tenant"):
        wanted(replace(scope(), tenant=""), "Why?")


# -- whose answers are found ----------------------------------------------------------------------


@BACKENDS
def test_an_answer_of_the_same_scope_is_found(store: Callable[[], VectorStore]) -> None:
    @runs
    async def check() -> None:
        table = Table(**{"How can I pay?": [1, 0.1, 0], "Where am I?": [0, 1, 0]})
        async with semantic_cache(store, table) as (cache, metrics):
            await learn(cache, scope("How do I pay?"))
            assert await found(cache, scope("How can I pay?")) == "acme"
            assert await found(cache, scope("Where am I?")) is None  # not near
            assert await found(cache, scope("How can I pay 5?")) is None  # near, and a number
            for other in (
                {"tenant": "acmf"},
                {"target": "small@2"},
                {"prompt": "v2"},
                {"guard": "v2"},
                {"model": "other"},
                {"max_tokens": 5},
                {"stream": True},
                {"messages": [
                    {"role": "system", "content": "Be rude."},
                    {"role": "user", "content": "How can I pay?"},
                ]},
            ):  # fmt: skip
                assert await found(cache, scope("How can I pay?", **other)) is None
            assert value(metrics, "lookups_total", tier="semantic", outcome="hit") == 1
            assert value(metrics, "stored_total", tier="semantic") == 1

    check()


@BACKENDS
def test_answers_end_and_are_purged(store: Callable[[], VectorStore]) -> None:
    @runs
    async def check() -> None:
        now = [1e9]
        async with semantic_cache(store, wall=lambda: now[0], ttl_seconds=10) as (cache, _):
            for number in range(3):
                await learn(cache, scope("A?", target=f"rel-{number}+1"))
            assert await found(cache, scope("B?", target="rel-0+1"))
            assert cache.semantic is not None
            assert await cache.semantic.purge(Purge(release="rel-0")) == 1
            assert await found(cache, scope("B?", target="rel-0+1")) is None
            assert await found(cache, scope("B?", target="rel-1+1"))
            now[0] += 11
            assert await found(cache, scope("B?", target="rel-1+1")) is None
            assert await cache.semantic.purge(Purge(tenant="other")) == 0
            assert await cache.semantic.purge(Purge(tenant="acme", release="rel-1")) == 1
            assert await cache.semantic.purge(Purge()) == 1

    check()


@runs
async def test_a_reload_moves_the_threshold_and_turns_it_off() -> None:
    async with semantic_cache(embedder=Table(**{"B?": [1, 0.3, 0]})) as (cache, _):
        await learn(cache, scope("A?"))
        assert await found(cache, scope("B?"))  # cosine 0.958
        for change in ({"threshold": 0.99}, {"enabled": False}):
            block = cache.config.semantic.model_copy(update={"threshold": 0.9, **change})
            cache.configure(cache.config.model_copy(update={"semantic": block}))
            assert await found(cache, scope("B?")) is None


@runs
async def test_the_oldest_make_room() -> None:
    async with semantic_cache(lambda: edge(4)) as (cache, _):
        for number in range(5):
            await learn(cache, scope("A?", tenant=f"t{number}"))
        hits = [await found(cache, scope("B?", tenant=f"t{number}")) for number in range(5)]
        assert hits == [None, None, "t2", "t3", "t4"]


@BACKENDS
def test_colliding_vectors_lead_to_no_other_tenant(store: Callable[[], VectorStore]) -> None:
    """Every text has the same vector, and tenants are spelt to be mistaken for one another."""
    names = ["a", "a\0b", 'a"', 'a","b', "a/b", "a:b", "A", "\u0430", "a\u200b", "a ", "*", "a*"]

    @runs
    async def check() -> None:
        async with semantic_cache(store) as (cache, _):
            for name in names:
                await learn(cache, scope("Question?", tenant=name))
            for name in names:
                assert await found(cache, scope("Another?", tenant=name)) == name
            for name in ("b", "", "a\0", "aa", "\u0251"):
                if name:
                    assert await found(cache, scope("Another?", tenant=name)) is None

    check()


@runs
async def test_what_the_store_finds_is_looked_at_again() -> None:
    class Leaking(EdgeVectors):
        """A store whose filter does nothing."""

        first = wanted(scope(), "?")

        def find(self, vector: Any, want: Any, now: float, threshold: float) -> Any:
            return super().find(vector, self.first, now, 0.0)

        def add(self, identity: str, vector: Any, want: Any, payload: Any) -> None:
            type(self).first = want
            super().add(identity, vector, want, payload)

    async with semantic_cache(lambda: Leaking(10), Table(far=[0, 1, 0])) as (cache, _):
        await learn(cache, scope("Question?"))
        assert await found(cache, scope("Another?")) == "acme"
        assert await found(cache, scope("Another?", tenant="other")) is None
        assert await found(cache, scope("Another?", guard="v2")) is None
        assert await found(cache, scope("Another 5?")) is None
        assert await found(cache, scope("far")) is None


# -- verification, failures -----------------------------------------------------------------------


@runs
async def test_a_share_of_hits_is_answered_by_the_model_and_compared() -> None:
    table = Table(**{"It costs 5 euros.": [0, 1, 0], "Nothing.": [0, 0, 1]})
    async with semantic_cache(embedder=table, chance=0.0, verify=0.1) as (cache, metrics):
        for number, (said, outcome) in enumerate(
            [
                ("It is free.", ""),
                ("It is free.", "agree"),
                ("Nothing.", "differ"),
                ("It is free, 7 times.", "differ"),  # the same vector, another number
                ("", "unknown"),
            ]
        ):
            flight = await cache.lookup(scope("What is it?" + " " * number))
            assert isinstance(flight, Flight)
            assert (flight.rival is None) == (number == 0)
            flight.put(answer(said))
            assert cache.semantic is not None
            await cache.semantic.flush()
            if outcome:
                assert value(metrics, "verified_total", outcome=outcome) >= 1
            cache.memory._entries.clear()
            await cache.semantic.purge(Purge())
            again = await cache.lookup(scope("Say?"))
            assert isinstance(again, Flight)
            again.put(answer("It is free."))
            await cache.semantic.flush()
            cache.memory._entries.clear()
        assert value(metrics, "verified_total", outcome="differ") == 2


@runs
async def test_a_slow_model_and_a_broken_store_are_misses() -> None:
    import threading

    gate = threading.Event()

    class Slow(Table):
        def embed_questions(self, texts: list[str]) -> Any:
            if texts == ["slow"]:
                gate.wait(10)
            return super().embed_questions(texts)

    async with semantic_cache(embedder=Slow()) as (cache, metrics):
        assert cache.semantic is not None
        cache.semantic.config = cache.semantic.config.model_copy(update={"budget_ms": 30})
        began = asyncio.get_running_loop().time()
        assert await found(cache, scope("slow")) is None
        assert asyncio.get_running_loop().time() - began < 2
        gate.set()
        assert value(metrics, "failures_total", tier="semantic", what="get") == 1

    def broken() -> VectorStore:
        raise ConnectionError

    async with semantic_cache(broken) as (cache, metrics):
        for _ in range(3):
            flight = await cache.lookup(scope())
            assert isinstance(flight, Flight)
            flight.fail()
        assert value(metrics, "failures_total", tier="semantic", what="get") == 4  # and its start


@runs
async def test_followers_get_a_semantic_hit_too_and_a_client_that_leaves_passes_it_on() -> None:
    async with semantic_cache() as (cache, _):
        await learn(cache, scope("A?"))
        tasks = [asyncio.create_task(cache.lookup(scope("B?"))) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # it leads, and is searching
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert isinstance(results[0], asyncio.CancelledError)
        tiers = [one.tier for one in results[1:] if isinstance(one, Hit)]
        assert sorted(tiers) == ["flight"] * 3 + ["semantic"]


@runs
async def test_the_packaged_model_finds_a_paraphrase() -> None:
    """The real embedder and engine; 1 s to load the weights."""
    block = Semantic(enabled=True, threshold=0.8, verify=0, budget_ms=5_000)
    metrics = Metrics()
    settings = Settings.from_env({})
    cache = ResponseCache(config(semantic=block.model_dump()), settings, metrics)
    await cache.start()
    try:
        await learn(cache, scope("My card has not arrived yet, where is it?"))
        near = scope("Where is my card, it has not arrived yet?")
        assert await found(cache, near) == "acme"
        assert await found(cache, scope("Where is my card, it has arrived?")) is None
        assert await found(cache, scope("How do I change my address?")) is None
    finally:
        await cache.close()


def test_a_server_by_its_address(tmp_path: Path) -> None:
    """Nobody listens there: opening costs nothing, a query fails, and the tier pauses (above)."""
    settings = Settings.from_env({"QDRANT_URL": "http://127.0.0.1:1"})
    store = open_vectors(settings, Semantic(), "0123")
    assert isinstance(store, ServerVectors) and store.collection == "ratchet-cache-0123"
    with pytest.raises(Exception, match="refused"):
        store.find([1.0], wanted(scope(), "A?"), 0.0, 0.9)
    store.close()
