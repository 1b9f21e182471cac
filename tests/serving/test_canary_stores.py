"""Marked strings in what is kept outside of this process: Redis (cache and limits, its file on the
disk included) and Qdrant; and in what guards in mode async tell. test_canary_strings.py has the
other sinks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from qdrant_client import QdrantClient

from contracts.settings import Settings
from resources.keys import KeyStore
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.semantic import SemanticTier
from serving.gateway.cache.vectors import EdgeVectors, ServerVectors, VectorStore
from serving.gateway.guards import budget
from serving.gateway.metrics import Metrics
from tests.servers import Server, redis_server  # noqa: F401
from tests.serving.cache_requests import Table
from tests.serving.conftest import Running, until
from tests.serving.fake_engine import FakeEngine
from tests.serving.faults import on_loop
from tests.serving.test_canary_strings import (  # noqa: F401
    Canaries,
    Watched,
    canaries,
    ended,
    everything,
    leaks,
    send,
    watched,
)
from tests.serving.test_gateway_plain import configured

CLEAN = ("Where is the town hall?", "It is in the old market.")


@dataclass
class Kept:
    """A gateway with all tiers of its cache, and what lies in them."""

    running: Running
    engine: FakeEngine
    store: VectorStore
    server: Server

    def ask(
        self, question: str, answer: str, *, path: str = "chat/completions", **more: Any
    ) -> None:
        self.engine.answer = answer
        asked = {"messages": [{"role": "user", "content": question}]}
        if path != "chat/completions":
            asked = {"prompt" if path == "completions" else "input": question}  # type: ignore[dict-item]
        headers = more.pop("headers", {})
        body = {"model": "small", "temperature": 0, **asked, **more}
        for _ in range(2):  # the second one comes from this process' memory
            response = send(self.running.client, path, headers, body)
            assert response.status_code == 200, response.text

    def refused(self) -> float:
        return self.running.metric("ratchet_gateway_cache_refused_total", reason="private")

    def in_redis(self) -> bytes:
        """Every key and value, and the file that Redis writes."""
        found = []
        with redis.Redis.from_url(self.server.url) as client:
            for name in client.scan_iter("*"):
                read: dict[bytes, Callable[[], Any]] = {
                    b"string": lambda name=name: client.get(name),
                    b"hash": lambda name=name: client.hgetall(name),
                    b"list": lambda name=name: client.lrange(name, 0, -1),
                    b"zset": lambda name=name: client.zrange(name, 0, -1, withscores=True),
                }
                value = read[client.type(name)]()
                found += [name, value if isinstance(value, bytes) else repr(value).encode()]
        files = [file for file in self.server.home.rglob("*.aof") if file.is_file()]
        assert files
        return b"\n".join([*found, *(file.read_bytes() for file in files)])

    def in_qdrant(self) -> bytes:
        """Every payload; of the engine in this process its files as well."""
        if isinstance(self.store, ServerVectors):
            points, _ = self.store._client.scroll(self.store.collection, limit=1000)
            return json.dumps([point.payload for point in points]).encode()
        import qdrant_edge as edge

        assert isinstance(self.store, EdgeVectors)
        found = []
        for folder, shard in self.store._shards:
            points, _ = shard.scroll(edge.ScrollRequest(limit=1000, with_payload=True))
            found += [json.dumps(point.payload).encode() for point in points]
            shard.flush()
            found += [file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()]
        return b"\n".join(found)


@pytest.fixture(params=["edge", "server"])
def kept(
    request: pytest.FixtureRequest, settings: Settings, start: Callable[..., Running],
    own_engine: FakeEngine, redis_server: Server, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> Iterator[Kept]:  # fmt: skip
    """Vectors come from a table: every question is near every other one of its scope."""
    store: VectorStore = EdgeVectors(100)
    if request.param == "server":
        store = ServerVectors(QdrantClient(":memory:"), "cache")

    def of(config: Semantic, _: Settings, metrics: Metrics) -> SemanticTier:
        return SemanticTier(config, Table(), lambda: store, metrics, chance=lambda: 1.0)

    monkeypatch.setattr(SemanticTier, "of", of)
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    cache = {
        "exact": {"timeout_ms": 1_000},
        "semantic": {"enabled": True, "budget_ms": 5_000, "threshold": 0.9},
    }
    limits = {"backend": "redis", "timeout_ms": 5_000}
    running = start(
        config=configured(own_engine.url, cache=cache, limits=limits, auth={"required": True}),
        settings=replace(settings, redis_url=redis_server.url),
    ).ready()
    keys = KeyStore.open(settings)
    token = keys.create("acme", "a key", limits={"session_tokens": 1_000_000}).token
    keys.close()
    running.client.headers["authorization"] = f"Bearer {token}"
    body = {"model": "small", "input": "hello"}
    until(lambda: send(running.client, "embeddings", {}, body).status_code == 200)
    yield Kept(running, own_engine, store, redis_server)


def written(kept: Kept) -> tuple[bytes, bytes]:
    """What lies in Redis and Qdrant when everything that waits is there."""
    cache = kept.running.gateway.services.cache

    async def flush() -> None:
        await asyncio.gather(*cache._sharing)
        assert cache.redis is not None and cache.semantic is not None
        await cache.redis.flush()
        await cache.semantic.flush()

    on_loop(kept.running, flush())
    name = "ratchet_gateway_cache_stored_total"
    with redis.Redis.from_url(kept.server.url) as client:  # the last ones may be under way
        until(
            lambda: len(client.keys("ratchet:cache:a:*")) == kept.running.metric(name, tier="redis")
        )
    return kept.in_redis(), kept.in_qdrant()


def test_what_other_processes_read_of_the_cache(kept: Kept, canaries: Canaries) -> None:  # noqa: F811
    """Answers with a canary stay in this process, however the engine cut them; the others are where
    the cache keeps them. No question lies in Redis."""
    asked, fee = canaries("question"), "What is the fee for the blue card?"
    kept.ask(asked, "Nothing is known of that.", user=canaries("user"))
    system = {"role": "system", "content": canaries("system")}
    user = {"role": "user", "content": "Who is it?"}
    kept.ask("", CLEAN[1], messages=[system, user])
    for stream in (False, True):
        for words in (".", r"\S+\s*"):
            kept.engine.words = words
            kept.ask(fee, canaries(f"answer {stream} {words}"), stream=stream, seed=len(words))
        kept.ask(fee, "word " * 2_000 + canaries(f"long {stream}"), stream=stream, seed=7)
    kept.ask(canaries("prompt"), CLEAN[1], path="completions")
    kept.ask(canaries("input"), "", path="embeddings")
    kept.ask("Hello?", CLEAN[1], headers={"x-session-id": canaries("session")})
    in_redis, in_qdrant = written(kept)
    assert canaries.in_(in_redis) == [] and canaries.in_(in_qdrant) == []
    assert kept.refused() == 7  # six answers; the question with a canary only for Qdrant
    assert CLEAN[1].encode() in in_redis and b"Nothing is known of that" in in_redis
    assert b"Nothing is known of that" not in in_qdrant


def test_the_search_of_stores_can_fail(kept: Kept, canaries: Canaries) -> None:  # noqa: F811
    """What may lie there is found, so what must not would be."""
    word, said = canaries.word("question"), canaries.word("answer")
    for stream in (False, True):
        kept.ask(f"Where is the {word}?", f"Behind {said} it is.", stream=stream)
    in_redis, in_qdrant = written(kept)
    assert canaries.in_(in_redis) == ["answer"]
    assert canaries.in_(in_qdrant) == ["answer", "question"]
    assert kept.refused() == 0


ASYNC = {"mode": "async", "action": "flag"}
LATE = {
    "auth": {"required": True},
    "guards": {
        "policies": {
            "late": {
                "input": {"pii": ASYNC, "secrets": ASYNC, "injection": ASYNC},
                "output": {"pii": ASYNC, "secrets": ASYNC, "schema": ASYNC,
                           "leak": {**ASYNC, "words": 6}},
            }
        }
    },
    "guard": "late",
}  # fmt: skip


@pytest.mark.parametrize("watched", [LATE], indirect=True, ids=["async"])
@pytest.mark.parametrize("broken", [False, True], ids=["works", "breaks"])
def test_guards_out_of_band_tell_no_text(
    watched: Watched, canaries: Canaries, capfd: pytest.CaptureFixture[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, broken: bool,
) -> None:  # fmt: skip
    """They find, or fail with words in the exception, and the audit log hears kinds and places."""
    running = watched.running
    said = canaries("what failed says")
    if broken:

        async def spend(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"it was {said}")

        monkeypatch.setattr(budget.Budget, "spend", spend)
    statuses = []
    for number, item in enumerate(everything(canaries, watched.token)):
        watched.engine.answer = f"Fact 1. {canaries(f'answer {number}')}"
        statuses.append(send(running.client, *item).status_code)
    assert statuses.count(200) > 10 and 500 not in statuses
    ended(watched, len(statuses) - 1)
    queue = running.gateway.services.now.guards._later._queue
    until(lambda: queue.empty())
    audit = running.settings.state_dir / "audit"

    def late() -> list[dict[str, Any]]:
        lines = [json.loads(x) for f in audit.glob("*.jsonl") for x in f.read_text().splitlines()]
        return [line for line in lines if line["event"] == "late"]

    if broken:
        assert running.metric("ratchet_gateway_guard_failures_total",
                              guard="async", outcome="error", policy="open") > 10  # fmt: skip
        assert "RuntimeError" in watched.log.getvalue() and not late()
    else:
        until(lambda: {(line["side"], f["kind"]) for line in late() for f in line["findings"]} >= {
            ("input", "email"), ("input", "api_key"), ("output", "email"), ("output", "api_key"),
        })  # fmt: skip
    assert leaks(watched, canaries, capfd) == {}
