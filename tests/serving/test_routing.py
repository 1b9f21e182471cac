"""The router in front of real sockets: choice, retries, failover, breaking; clocks are ours."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError
from serving.gateway.api_request import ApiRequest
from serving.gateway.metrics import Metrics
from serving.gateway.routing.config import TIERS, Routing
from serving.gateway.routing.router import Router
from serving.gateway.routing.tiers import Classifier
from serving.gateway.upstream import UpstreamClient
from serving.gateway.upstream_errors import UpstreamError
from tests.serving.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def engines() -> Iterator[list[FakeEngine]]:
    with FakeEngine("one") as one, FakeEngine("two") as two, FakeEngine("three") as three:
        yield [one, two, three]


@pytest.fixture
def fakes(engines: list[FakeEngine]) -> list[FakeEngine]:
    for engine in engines:
        engine.fault, engine.waiting, engine.pause = "", 0, 0.0
        engine.bodies.clear()
        engine.headers.clear()
        engine.paths.clear()
    return engines


class Clock:
    """Time that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class World:
    """A router, its clock and its metrics."""

    def __init__(self, client: UpstreamClient, config: dict[str, Any], **more: Any) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        more.setdefault("random", random.Random(7).random)
        self.router = Router(
            client, self.metrics, Routing.model_validate(config), salt=b"salt", environ={},
            clock=self.clock, sleep=self.clock.sleep, **more,
        )  # fmt: skip

    async def ask(self, stream: bool = True, model: str = "m", **more: Any) -> bytes:
        wanted = request(stream, **more)
        async with await self.router.open(
            self.router.routes[model], wanted, tenant="acme", request_id="req-1"
        ) as response:
            if not stream:
                return response.body
            return b"".join([piece async for piece in response.chunks()])

    async def error(self, **more: Any) -> UpstreamError:
        with pytest.raises(UpstreamError) as caught:
            await self.ask(**more)
        return caught.value

    def attempts(self, provider: str, outcome: str) -> float:
        labels = {"provider": provider, "outcome": outcome}
        name = "ratchet_gateway_upstream_attempts_total"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def request(stream: bool = True, text: str = "hi", session: str = "", **body: Any) -> ApiRequest:
    return ApiRequest(
        kind="chat", model="m", stream=stream, session=session,
        body={"model": "m", "stream": stream,
              "messages": [{"role": "user", "content": text}], **body},
    )  # fmt: skip


def config(fakes: list[FakeEngine], count: int = 2, **model: Any) -> dict[str, Any]:
    """The first engines as providers a, b, c of the model m."""
    more = {
        name: model.pop(name) for name in ("retries", "breaker", "poll_seconds") if name in model
    }
    names = "abc"[:count]
    patience = 0.3 if "hang" in {fake.fault for fake in fakes} else 10
    timeouts = {"connect": 5, "first_byte": patience, "unstreamed": patience, "stall": 10}
    providers = {
        name: {"url": fake.url + "/v1", "dialect": "vllm", "timeouts": timeouts}
        for name, fake in zip(names, fakes, strict=False)
    }
    candidates = model.pop("candidates", [{"provider": n, "model": f"model-{n}"} for n in names])
    return {
        "providers": providers,
        "models": [{"name": "m", "candidates": candidates, **model}],
        **more,
    }


def run(use: Callable[[UpstreamClient], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        async with UpstreamClient() as client:
            return await use(client)

    return asyncio.run(main())


#: Draws that always choose the first candidate and wait as long as jitter allows.
FIRST = {"random": lambda: 0.0}


def test_what_goes_up(fakes: list[FakeEngine]) -> None:
    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, 1, defaults={"temperature": 0.3, "top_p": 0.9}))
        out = await world.ask(top_p=0.5, big=1 << 70)
        assert b'"usage"' not in out  # only we asked
        other = ApiRequest(kind="embeddings", model="m", body={"model": "m", "input": "x"})
        await world.router.open(world.router.routes["m"], other, tenant="b", request_id="r")

    run(use)
    first, second = fakes[0].bodies
    assert first["model"] == "model-a" and first["stream_options"] == {"include_usage": True}
    assert (first["temperature"], first["top_p"], first["big"]) == (0.3, 0.5, 1 << 70)
    assert len(first["cache_salt"]) == 64 and int(first["cache_salt"], 16)
    assert second["cache_salt"] != first["cache_salt"] and "stream" not in second
    assert {n.lower(): v for n, v in fakes[0].headers[0].items()}["x-request-id"] == "req-1"


def test_other_providers_get_no_fields_of_vllm(fakes: list[FakeEngine]) -> None:
    async def use(client: UpstreamClient) -> None:
        found = config(fakes, 1)
        found["providers"]["a"]["dialect"] = "openai"
        await World(client, found).ask(cache_salt="the client's", include_usage=True)

    run(use)
    assert "cache_salt" not in fakes[0].bodies[0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", ["503", "429", "500", "reset-first", "401", "hang"])
def test_another_candidate_answers(fakes: list[FakeEngine], fault: str, stream: bool) -> None:
    fakes[0].fault = fault

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes), **FIRST)
        assert await world.ask(stream)
        assert world.attempts("b", "ok") == 1
        retried = world.metrics.registry.get_sample_value
        outcome = {"503": "saturated", "429": "saturated", "500": "error", "401": "denied",
                   "reset-first": "unreachable", "hang": "timeout"}[fault]  # fmt: skip
        assert retried("ratchet_gateway_upstream_retries_total", {"after": outcome}) == 1
        assert world.attempts("a", outcome) == 1

    run(use)


def test_a_bad_request_is_asked_once(fakes: list[FakeEngine]) -> None:
    fakes[0].fault = fakes[1].fault = "context"

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, breaker={"failures": 1}))
        for _ in range(20):
            assert (await world.error()).code == "context_length_exceeded"
        assert all(r.health.breaker.state == "closed" for r in world.router.routes["m"].replicas)

    run(use)
    assert len(fakes[0].paths) + len(fakes[1].paths) == 20


def test_after_the_first_byte_nothing_is_asked_again(fakes: list[FakeEngine]) -> None:
    fakes[0].fault, fakes[0].pause = "reset-mid", 0.02

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes), **FIRST)
        assert (await world.error()).code == "engine_disconnected"
        assert world.attempts("a", "disconnected") == 1
        assert world.router.routes["m"].replicas[0].health.breaker.counts(world.clock()) == (0, 1)

    run(use)
    assert (len(fakes[0].paths), len(fakes[1].paths)) == (1, 0)


def test_a_lone_engine_is_asked_again_with_full_jitter(fakes: list[FakeEngine]) -> None:
    fakes[0].fault = "500"

    async def use(client: UpstreamClient) -> None:
        retries = {"attempts": 4, "base_seconds": 0.1, "max_wait_seconds": 0.3}
        world = World(client, config(fakes, 1, retries=retries), random=lambda: 0.999)
        assert (await world.error()).code == "engine_error"
        assert world.clock.slept == pytest.approx([0.2, 0.3, 0.3], rel=0.01)  # of 0.2, 0.4, 0.8

    run(use)
    assert len(fakes[0].paths) == 4


@pytest.mark.parametrize("fault", ["503", "429", "hang", "404"])
def test_a_lone_engine_that_is_full_or_slow_is_not_asked_again(
    fakes: list[FakeEngine], fault: str
) -> None:
    fakes[0].fault = fault

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, 1, breaker={"failures": 1, "ratio": 0.01}))
        error = await world.error()
        full = fault in ("503", "429")
        assert ("retry-after" in error.all_headers()) == full
        state = world.router.routes["m"].replicas[0].health.breaker.state
        assert state == ("open" if fault == "hang" else "closed")

    run(use)
    assert len(fakes[0].paths) == 1


def test_retry_after_is_honoured(fakes: list[FakeEngine]) -> None:
    fakes[0].fault = "429-wait"

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, 1, retries={"attempts": 2}))
        await world.error()
        assert sum(world.clock.slept) >= 1.0  # it said one second
        asked = len(fakes[0].paths)
        error = await world.error()  # the second answer said so again: not even asked
        assert (error.code, len(fakes[0].paths)) == ("engine_overloaded", asked)
        assert error.headers["retry-after"] == "1"
        world.clock.now += 1.01
        fakes[0].fault = ""
        assert await world.ask()
        both = World(client, config(fakes), **FIRST)
        fakes[0].fault = "429-wait"
        assert await both.ask() and sum(both.clock.slept) < 1  # the other one at once
        assert await both.ask() and both.attempts("a", "saturated") == 1  # left alone meanwhile

    run(use)


def test_retries_stay_within_their_budget(fakes: list[FakeEngine]) -> None:
    fakes[0].fault = fakes[1].fault = "500"

    async def use(client: UpstreamClient) -> None:
        quiet = {"failures": 100_000}
        retries = {"attempts": 5, "ratio": 0.1, "burst": 4}
        world = World(client, config(fakes, retries=retries, breaker=quiet))
        for _ in range(60):
            await world.error()
        sent = len(fakes[0].paths) + len(fakes[1].paths)
        assert 60 + 4 + 4 <= sent <= 60 + 4 + 6
        refused = world.metrics.registry.get_sample_value
        assert (refused("ratchet_gateway_upstream_retries_refused_total") or 0) >= 50

    run(use)


def test_the_breaker_opens_probes_once_and_closes(fakes: list[FakeEngine]) -> None:
    fakes[0].fault = "500"

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, 1, retries={"attempts": 1},
                                     breaker={"failures": 3, "open_seconds": 5}))  # fmt: skip
        gauge = {"provider": "a", "model": "model-a"}
        state = world.metrics.registry.get_sample_value
        for _ in range(3):
            await world.error()
        assert state("ratchet_gateway_breaker_state", gauge) == 2
        error = await world.error()
        assert (error.code, len(fakes[0].paths)) == ("engine_unreachable", 3)
        assert error.headers["retry-after"] == "5"
        world.clock.now += 5
        fakes[0].fault = ""
        fakes[0].pause = 0.02
        answers = await asyncio.gather(*(world.ask() for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(answer, bytes) for answer in answers) == 1
        assert len(fakes[0].paths) == 4  # exactly one probe
        assert state("ratchet_gateway_breaker_state", gauge) == 0
        fakes[0].pause = 0
        assert await world.ask()

    run(use)


def test_a_probe_whose_client_leaves_makes_way(fakes: list[FakeEngine]) -> None:
    async def use(client: UpstreamClient) -> None:
        breaker = {"failures": 1, "open_seconds": 5}
        world = World(client, config(fakes, 1, retries={"attempts": 1}, breaker=breaker))
        fakes[0].fault = "500"
        await world.error()
        world.clock.now += 5
        fakes[0].fault = "hang"
        task = asyncio.ensure_future(world.ask())
        while len(fakes[0].paths) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        health = world.router.routes["m"].replicas[0].health
        assert health.in_flight == 0 and health.breaker.state == "half_open"
        fakes[0].fault = ""
        assert await world.ask()
        assert health.breaker.state == "closed" and world.attempts("a", "cancelled") == 1

    run(use)


def test_in_flight_returns_to_nothing(fakes: list[FakeEngine]) -> None:
    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, 3))
        faults = ["", "500", "reset-mid", "error-mid", "eof", "503", "context", "fault-free"]
        asked = [world.ask(stream, text=f"fault:{fault}") for fault in faults
                 for stream in (True, False)]  # fmt: skip
        await asyncio.gather(*asked, return_exceptions=True)
        assert [r.health.in_flight for r in world.router.routes["m"].replicas] == [0, 0, 0]

    run(use)


def test_tiers_choose_and_fail_over_upwards_first(fakes: list[FakeEngine]) -> None:
    hard = "Prove that this algorithm is correct, derive its complexity and implement it in Python."

    async def use(client: UpstreamClient) -> None:
        candidates = [{"provider": n, "model": n, "tier": tier}
                      for n, tier in zip("abc", TIERS, strict=True)]  # fmt: skip
        world = World(client, config(fakes, 3, tiers=True, candidates=candidates))
        route = world.router.routes["m"]
        for text in ("Where is my card?", hard):
            response = await world.router.open(
                route, request(text=text), tenant="t", request_id="r"
            )
            response.close()
        assert [len(fake.paths) for fake in fakes] == [1, 0, 1]
        fakes[0].fault = "503"
        await world.ask(text="Where is my card?")
        assert [len(fake.paths) for fake in fakes] == [2, 1, 1]

    run(use)


def test_the_classifier_keeps_its_measured_quality() -> None:
    """On prompts that it was trained on, so this only notices a model file that does not fit."""
    classifier = Classifier.load()
    path = Path(__file__).parents[2] / "benchmarks" / "routing_tiers.tsv"
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    found = Counter((tier, classifier.of_text(text)) for tier, text in rows)
    assert found["complex", "fast"] == 0
    assert found["complex", "complex"] >= 14 and found["fast", "fast"] >= 8
    assert classifier.of_text("") in ("fast", "standard") and classifier.of_text("x" * 10**6)
    assert sum(classifier.probabilities("Hello").values()) == pytest.approx(1)
    assert classifier.tier(request(text="Hello", tools=[{"type": "function"}])) == "standard"


def test_queues_are_read_from_the_engines(fakes: list[FakeEngine]) -> None:
    fakes[0].waiting = 30

    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes, policy="least_loaded", poll_seconds=0.5))
        watch = asyncio.ensure_future(world.router.watch())
        value = world.metrics.registry.get_sample_value
        known = [{"provider": name, "model": f"model-{name}"} for name in "ab"]
        async with asyncio.timeout(10):
            while [value("ratchet_gateway_upstream_queue", labels) for labels in known] != [30, 0]:
                await asyncio.sleep(0.005)
        watch.cancel()
        await asyncio.gather(*(world.ask() for _ in range(10)))

    run(use)
    assert (len(fakes[0].paths), len(fakes[1].paths)) == (0, 10)


def test_a_reload_keeps_what_is_known_and_a_bad_one_changes_nothing(
    fakes: list[FakeEngine],
) -> None:
    async def use(client: UpstreamClient) -> None:
        world = World(client, config(fakes))
        router, old = world.router, world.router.routes["m"]
        old.replicas[0].health.in_flight = 3
        more = config(fakes, 3)
        router.configure(Routing.model_validate(more))
        new = router.routes["m"]
        assert new is not old and len(new.replicas) == 3
        assert new.replicas[0].health is old.replicas[0].health
        more["providers"]["a"]["api_key_env"] = "MISSING_KEY"
        more["providers"]["b"]["api_key_env"] = "MISSING_TOO"
        with pytest.raises(ConfigError) as caught:
            router.configure(Routing.model_validate(more))
        assert "MISSING_KEY" in str(caught.value) and "MISSING_TOO" in str(caught.value)
        assert router.routes["m"] is new
        changed = config(fakes, 3, breaker={"failures": 1})
        router.configure(Routing.model_validate(changed))
        replica = router.routes["m"].replicas[0]
        replica.health.breaker.failure(world.clock())
        assert replica.health.breaker.state == "open"

    run(use)


def test_a_release_is_a_route_of_its_own(fakes: list[FakeEngine]) -> None:
    """Known by its channel: another engine begins anew, other timeouts do not."""

    async def use(client: UpstreamClient) -> None:
        world = World(client, {})
        router = world.router
        route = router.route_to("stable", fakes[0].url, "nano")
        assert router.route_to("stable", fakes[0].url, "nano") is route
        router.routes["stable"] = route
        assert json.loads(await world.ask(stream=False, model="stable"))["id"] == "x-1"
        health = route.replicas[0].health
        router.configure(Routing.model_validate({"release_timeouts": {"first_byte": 1}}))
        again = router.route_to("stable", fakes[0].url, "nano")
        assert again.replicas[0].endpoint.timeouts.first_byte == 1
        assert again.replicas[0].health is health
        canary = router.route_to("canary", fakes[1].url, "nano")
        moved = router.route_to("stable", fakes[1].url, "nano")
        assert len({id(r.replicas[0].health) for r in (again, canary, moved)}) == 3
        assert set(router._releases) == {"stable", "canary"}

    run(use)
