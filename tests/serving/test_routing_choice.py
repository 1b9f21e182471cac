"""Choosing among replicas, reading engines' queues, and the configuration; nothing is asked."""

from __future__ import annotations

import importlib.util
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.gateway.endpoint import Endpoint
from serving.gateway.routing import load
from serving.gateway.routing.config import BreakerPolicy, Candidate, Routing
from serving.gateway.routing.replica import Health, Replica, affine, least_loaded, weighted


def replicas(*weights: float) -> list[Replica]:
    return [
        Replica(
            Endpoint("p", f"http://10.0.0.{number}", "m"), Health(BreakerPolicy()),
            Candidate(provider="p", model="m", weight=weight),
        )
        for number, weight in enumerate(weights)
    ]  # fmt: skip


def test_weights_are_shares() -> None:
    found, draw = replicas(1, 3, 6), random.Random(1).random
    counts = Counter(weighted(found, draw).name for _ in range(20_000))
    shares = [counts[replica.name] / 20_000 for replica in found]
    assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.015)  # 4 standard errors
    assert weighted(found, lambda: 1 - 1e-17) is found[-1]


def test_sessions_stay_and_only_those_of_a_lost_replica_move() -> None:
    found = replicas(1, 1, 1, 1)
    keys = [f"t\0session-{number}".encode() for number in range(4000)]
    before = {key: affine(found, key, 1.25) for key in keys}
    shares = Counter(replica.name for replica in before.values())
    assert min(shares.values()) > 900 and max(shares.values()) < 1100  # 1000 +- 4 x 27
    without = found[1:]
    moved = [key for key in keys if affine(without, key, 1.25) is not before[key]]
    assert set(moved) == {key for key in keys if before[key] is found[0]}


def test_a_hot_session_cannot_swamp_a_replica() -> None:
    found, key = replicas(1, 1, 1, 1), b"t\0hot"
    for _ in range(100):
        affine(found, key, 1.25).health.in_flight += 1
    loads = sorted(replica.health.in_flight for replica in found)
    assert sum(loads) == 100 and loads[-1] <= math.ceil(1.25 * 100 / 4)
    first, *_ = sorted(found, key=lambda r: r.score(key), reverse=True)
    assert first.health.in_flight == loads[-1]  # and is full before the next is used


def test_the_engines_queue_decides_until_it_is_stale() -> None:
    one, two = found = replicas(1, 1)
    one.health.heard(load.Load(waiting=9, running=3), 100)
    two.health.heard(load.Load(waiting=0, running=4), 100)
    draw = random.Random(1).random
    assert least_loaded(found, draw, 101, 3) is two
    two.health.in_flight = 9  # sent there since
    assert least_loaded(found, draw, 101, 3) is one
    two.health.in_flight = 0
    one.health.in_flight = 1
    assert least_loaded(found, draw, 101, 3) is two
    two.health.in_flight = 2  # stale: what this process knows
    assert least_loaded(found, draw, 104, 3) is one
    two.health.heard(None, 104)
    assert least_loaded(found, draw, 104, 3) is one


def test_metrics_pages() -> None:
    page = b"""# HELP vllm:num_requests_waiting Number
vllm:num_requests_running{engine="0",model_name="m}x"} 2.0
vllm:num_requests_running{engine="1",model_name="m}x"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m}x"} 1e1
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
"""
    assert load.parse(page) == load.Load(waiting=10, running=3)
    assert load.parse(page.replace(b"_running", b"_walking")) is None
    assert load.parse(b"<html>") is None


def test_the_installed_vllm_still_has_these_names() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "v1" / "metrics"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    assert [names[0] for names in load.ALIASES.values() if f'"{names[0]}"' not in text] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"providers": {"a": {"url": "ftp://x"}}}, "http"),
        ({"providers": {"a": {"url": "http://user:pw@x"}}}, "without user"),
        ({"models": [{"name": "m", "candidates": [{"provider": "z", "model": "x"}]}]},
         "no provider 'z'"),
        ({"models": [{"name": "m", "candidates": []}]}, "candidates"),
        ({"models": [{"name": "m", "tiers": True,
                      "candidates": [{"provider": "a", "model": "x"}]}]}, "needs a tier"),
        ({"model": []}, "Extra inputs"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Routing.model_validate({"providers": {"a": {"url": "http://x"}}, **change})


def test_keys_come_from_the_environment_only() -> None:
    found = Routing.model_validate(
        {"providers": {"a": {"url": "https://api.example.com/v1/", "api_key_env": "KEY_A"}}}
    )
    keys = found.keys({"KEY_A": "sk-1"})
    endpoint = found.endpoint(Candidate(provider="a", model="m"), keys)
    assert str(endpoint.urls["chat"]) == "https://api.example.com/v1/chat/completions"
    assert endpoint.api_key == "sk-1" and "sk-1" not in repr(endpoint) + repr(found)
