"""The gateway's cache: what a look-up costs, and whether one ever reaches another tenant's answer.

    python -m benchmarks.cache [--attacks 100000]

Costs are of the parts as the handler calls them, in one process, for a prompt of 250 bytes. The
attack asks as tenants whose names, prompts, guards and questions are made to be mistaken for those
of others: prefixes, separators of every kind, JSON inside of text, letters that look alike, case,
zero-width characters. In the semantic pass *every* text has the same vector, which is more than
CacheAttack (arXiv 2601.23088) achieves by search: only scope stands between the tenants.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from contracts.settings import Settings
from serving.gateway.cache import Answer, Cache, Flight, Hit, Purge, ResponseCache, Scope, scope
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.semantic import SemanticTier
from serving.gateway.cache.vectors import EdgeVectors
from serving.gateway.metrics import Metrics
from serving.gateway.plain_request import parse

BODY = (
    b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":40}}'
)
NAMES = ["acme", "acme-eu", "bank", "a", "b", "1", "null", "shop.eu", "shop_eu"]
SEPARATORS = [
    "/",
    ":",
    "|",
    ",",
    '","',
    '"],["',
    "\\",
    "\n",
    "\0",
    " ",
    "\u2028",
    "{}",
    "*",
    "?",
    "+",
]
#: Latin to Cyrillic and Greek letters that look the same, and what cannot be seen.
ALIKE = str.maketrans({"a": "\u0430", "e": "\u0435", "o": "\u043e", "c": "\u0441", "b": "\u042c"})
UNSEEN = ["\u200b", "\u200d", "\ufeff", "\u00ad", "\u0301"]


class Collisions:
    """An embedder for which all texts mean the same."""

    def embed_questions(self, texts: list[str]) -> Any:
        found = np.zeros((len(texts), 8), dtype=np.float32)
        found[:, 0] = 1.0
        return found

    embed = embed_questions


@dataclass
class Outcome:
    lookups: int = 0
    own: int = 0  # hits on what the same tenant had stored: the attack is not asking in vain
    crossed: int = 0  # hits on what another tenant had stored
    seconds: float = 0.0


def disguises(rng: random.Random, name: str) -> list[str]:
    """Names that are not ``name`` and look or split like it."""
    other, mark, unseen = rng.choice(NAMES), rng.choice(SEPARATORS), rng.choice(UNSEEN)
    found = [
        name + mark, mark + name, name + mark + other, name.upper(), name.translate(ALIKE),
        name + unseen, unseen + name, name[:-1], name + name[-1], f'{name}"', f"['{name}']",
        f"{name} ", name.replace("-", "\u2010"), name.replace(".", "\u2024"), "*", "%",
    ]  # fmt: skip
    return [one for one in found if one and one != name]


def ask(cache: ResponseCache, rng: random.Random, tenant: str, question: str, tail: str) -> Scope:
    """A request whose other fields try to continue or to end the field before them."""
    parts = {"prompt": "", "guard": "g1", "target": "m@1"}
    if tail:
        parts[rng.choice(list(parts))] += tail
    messages = [{"role": "user", "content": question}]
    request = parse("chat", "m", {"temperature": 0, "messages": messages})
    return scope(request, cache.config.exact, tenant=tenant, **parts)


async def attack(count: int, semantic: bool, seed: int = 0) -> Outcome:
    """``count`` look-ups by tenants that own something and tenants that own nothing."""
    rng, metrics, outcome = random.Random(seed), Metrics(), Outcome()
    block = Semantic(enabled=semantic, threshold=0.5, verify=0.0, budget_ms=5_000)
    tier = (
        SemanticTier(block, Collisions(), lambda: EdgeVectors(10_000), metrics)
        if semantic
        else None
    )
    cache = ResponseCache(Cache(semantic=block), Settings.from_env({}), metrics, semantic=tier)
    await cache.start()
    owners = sorted({*NAMES, *(one for name in NAMES for one in disguises(rng, name)[:8])})
    questions = [
        "Where is my card?",
        "Where is my card ?",
        "Where is my cаrd?",
        "where is my card?",
    ]
    for owner in owners:
        for question in questions[: 1 if semantic else 4]:
            found = await cache.lookup(ask(cache, rng, owner, question, ""))
            if isinstance(found, Flight):
                assert found.put(Answer(BODY, 40, 1, text=owner))
    if tier:
        await tier.flush()
    began = time.perf_counter()
    for number in range(count):
        victim = rng.choice(owners)
        tenant = victim if rng.random() < 0.2 else rng.choice(disguises(rng, victim))
        tail = rng.choice(["", "", rng.choice(SEPARATORS) + victim, f'","{victim}'])
        question = (
            rng.choice(questions) if not semantic else f"Where is my card{'?' * (number % 7)}!"
        )
        found = await cache.lookup(ask(cache, rng, tenant, question, tail))
        outcome.lookups += 1
        if isinstance(found, Hit):
            outcome.own += found.answer.text == tenant
            outcome.crossed += found.answer.text != tenant
        else:
            found.fail()
    outcome.seconds = time.perf_counter() - began
    failures = metrics.cache_failures.labels("semantic", "get")._value.get()
    assert failures == 0, f"{failures} look-ups were not asked"
    await cache.close()
    return outcome


async def costs(rounds: int = 5, count: int = 20_000) -> dict[str, float]:
    """Microseconds of each step, the best of several rounds."""
    cache = ResponseCache(Cache(), Settings.from_env({}), Metrics())
    requests = [
        parse("chat", "m", {"temperature": 0, "max_tokens": 64, "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{number:06d}" + "x" * 244},
        ]})
        for number in range(count)
    ]  # fmt: skip
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, float("inf")), seconds / count * 1e6)

    for _ in range(rounds):
        await cache.forget(Purge())
        began = time.perf_counter()
        scopes = [
            scope(request, cache.config.exact, tenant="acme", target="m@1", guard="g1")
            for request in requests
        ]
        note("scope and key", time.perf_counter() - began)
        began = time.perf_counter()
        flights = [await cache.lookup(one) for one in scopes]
        note("miss", time.perf_counter() - began)
        began = time.perf_counter()
        for flight in flights:
            assert isinstance(flight, Flight)
            flight.put(Answer(BODY, 40, 1))
        note("put", time.perf_counter() - began)
        began = time.perf_counter()
        for one in scopes:
            await cache.lookup(one)
        note("hit", time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--attacks", type=int, default=100_000)
    attacks = parser.parse_args().attacks
    for name, micros in asyncio.run(costs()).items():
        print(f"{name:14s} {micros:6.2f} us")
    for tier in ("exact", "semantic"):
        found = asyncio.run(attack(attacks, tier == "semantic"))
        print(
            f"{tier}: {found.lookups} look-ups, {found.crossed} cross-tenant hits, "
            f"{found.own} own hits, {found.seconds / found.lookups * 1e6:.0f} us each"
        )
        if found.crossed:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
