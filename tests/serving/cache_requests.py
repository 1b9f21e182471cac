"""Requests, scopes and answers of the cache's tests."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from contracts.settings import Settings
from serving.gateway.cache import Answer, Cache, ResponseCache, Scope
from serving.gateway.cache import scope as make_scope
from serving.gateway.cache.config import Exact, Semantic
from serving.gateway.cache.semantic import SemanticTier
from serving.gateway.cache.vectors import EdgeVectors, VectorStore
from serving.gateway.metrics import Metrics
from serving.gateway.plain_request import parse

EXACT = Exact()


def scope(question: str = "How do I pay?", /, **given: Any) -> Scope:
    """The scope of a chat request; ``tenant``, ``target``, ``prompt``, ``guard``, ``model``,
    ``personal`` and ``config`` go to the scope, anything else into the body."""
    names = ("tenant", "target", "prompt", "guard", "personal", "temperature_default")
    named: dict[str, Any] = {name: given.pop(name) for name in names if name in given}
    if "temperature_default" in named:
        named["temperature"] = named.pop("temperature_default")
    kind, config = given.pop("kind", "chat"), given.pop("config", EXACT)
    model = given.pop("model", "small")
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
    if kind != "chat":
        asked = {"prompt": question, "input": question}
    body = {"temperature": 0, **asked, **given}
    named = {"tenant": "acme", "target": "small@1", **named}
    return make_scope(parse(kind, model, body), config, **named)


def body_of(text: str = "By card.", finish: str | None = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "message": {"content": text, **message}, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode()


def stream_of(text: str = "By card.", finish: str | None = "stop", done: bool = True) -> bytes:
    found = b""
    for delta, end in (({"content": text}, None), ({}, finish)):
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        found += b"data: " + json.dumps(chunk).encode() + b"\n\n"
    return found + (b"data: [DONE]\n\n" if done else b"")


def answer(text: str = "By card.", **given: Any) -> Answer:
    return Answer(body_of(text), 10, 3, text=text, **given)


def config(**blocks: dict[str, Any]) -> Cache:
    return Cache.model_validate(blocks)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"ratchet_gateway_cache_{name}", labels) or 0.0


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def runs(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(test(*args, **named))

    return run


class Table:
    """Vectors by text; every other text has the first one."""

    def __init__(self, **vectors: Any) -> None:
        self.vectors = vectors
        self.asked: list[str] = []

    def embed_questions(self, texts: list[str]) -> Any:
        self.asked += texts
        found = np.array(
            [self.vectors.get(text, [1.0, 0.0, 0.0]) for text in texts], dtype=np.float32
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    embed = embed_questions


def edge(max_entries: int = 100) -> VectorStore:
    return EdgeVectors(max_entries)


@asynccontextmanager
async def semantic_cache(
    store: Callable[[], VectorStore] = edge,
    embedder: Any = None,
    chance: float = 1.0,
    wall: Callable[[], float] | None = None,
    settings: Settings | None = None,
    **more: Any,
) -> AsyncIterator[tuple[ResponseCache, Metrics]]:
    metrics = Metrics()
    block = Semantic(enabled=True, budget_ms=5_000, **{"threshold": 0.9, **more})
    clock: dict[str, Any] = {"wall": wall} if wall else {}
    tier = SemanticTier(block, embedder or Table(), store, metrics, chance=lambda: chance, **clock)
    whole = config(semantic=block.model_dump())
    cache = ResponseCache(whole, settings or Settings.from_env({}), metrics, semantic=tier)
    await cache.start()
    try:
        yield cache, metrics
    finally:
        await cache.close()
