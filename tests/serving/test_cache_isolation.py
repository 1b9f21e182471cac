"""No look-up reaches another tenant: the benchmark's attack in small, and that it would notice."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from benchmarks import cache
from serving.gateway.cache import scope


@pytest.mark.parametrize(("semantic", "count"), [(False, 3_000), (True, 1_500)])
def test_no_disguise_reaches_another_tenant(semantic: bool, count: int) -> None:
    outcome = asyncio.run(cache.attack(count, semantic, seed=1))
    assert outcome.crossed == 0
    assert outcome.own > count / 20  # there was something to be had


@pytest.mark.parametrize("semantic", [False, True])
def test_the_attack_notices_a_scope_that_leaks(
    monkeypatch: pytest.MonkeyPatch, semantic: bool
) -> None:
    """A scope that looks at the first letter of a tenant only."""

    def leaking(request: Any, config: Any, *, tenant: str, **parts: Any) -> Any:
        made = scope(request, config, tenant=tenant[:1], **parts)
        return dataclasses.replace(made, tenant=tenant[:1])

    monkeypatch.setattr(cache, "scope", leaking)
    assert asyncio.run(cache.attack(500, semantic)).crossed > 20
