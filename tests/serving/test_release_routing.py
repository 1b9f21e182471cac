"""A release's engine is asked as those of plain models are: retries, breaker, spans, timeouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from contracts.settings import Settings
from resources import requests as request_log
from serving.gateway.config import GatewayConfig
from serving.gateway.routing.config import Routing
from tests.serving.collector import Collector, attributes
from tests.serving.conftest import Running, until
from tests.serving.factory import point
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_gateway_switch import ECHO, marks, two


def config(**routing: Any) -> GatewayConfig:
    routing.setdefault("retries", {"base_seconds": 0.001})
    return GatewayConfig(routing=Routing.model_validate(routing))


class FailsOnce(FakeEngine):
    """Its first answer is a fault."""

    def _fault(self, body: dict[str, Any]) -> str:
        return self.fault if len(self.bodies) <= 1 else ""


@pytest.fixture
def once() -> Iterator[FailsOnce]:
    engine = FailsOnce()
    with engine:
        yield engine


def record_of(gateway: Running, response: Any) -> Any:
    name = response.headers["x-ratchet-response-id"]
    return until(lambda: request_log.find(gateway.settings, name))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["500", "error-first", "empty"])
def test_what_fails_before_the_first_byte_is_asked_again(
    settings: Settings, release: str, once: FailsOnce, start: Callable[..., Running],
    fault: str, stream: bool,
) -> None:  # fmt: skip
    once.fault = fault
    point(settings, release, once.url)
    gateway = start(config=config()).ready()
    response = gateway.ask("x", stream=stream)
    assert response.status_code == 200 and len(once.bodies) == 2
    record = record_of(gateway, response)
    assert (record.attempts, record.provider, record.error) == (2, "release", None)
    outcome = "disconnected" if fault == "empty" else "error"
    name = "ratchet_gateway_upstream_attempts_total"
    assert gateway.metric(name, provider="release", outcome=outcome) == 1
    assert gateway.metric(name, provider="release", outcome="ok") == 1


def test_an_engine_that_fails_is_left_alone_and_then_tried(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    breaker = {"open_seconds": 0.2}
    gateway = start(config=config(breaker=breaker, retries={"attempts": 1})).ready()
    own_engine.fault = "500"
    for _ in range(5):
        assert gateway.ask("x").status_code == 502
    asked = len(own_engine.bodies)
    alone = gateway.ask("x")
    assert alone.json()["error"]["code"] == "engine_unreachable"
    assert int(alone.headers["retry-after"]) >= 1 and len(own_engine.bodies) == asked
    own_engine.fault = ""
    until(lambda: gateway.ask("x").status_code == 200, 5)
    labels = {"provider": "release", "model": "nano"}
    assert gateway.metric("ratchet_gateway_breaker_state", **labels) == 0


def test_an_engine_that_dies_over_a_prompt_costs_nothing_after_a_deployment(
    settings: Settings, start: Callable[..., Running]
) -> None:
    """Nothing of the answer came: the request runs again, whole, on the new release."""
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        point(settings, first, a.url)
        gateway = start(config=config()).ready()
        a.fault = "hang-body"
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(gateway.ask, "x")
            until(lambda: a.open == 1)
            point(settings, second, b.url)
            until(lambda: gateway.client.get("/readyz").json()["release"] == second)
            a.stop()
            response = answer.result()
    assert response.status_code == 200 and marks(response.json()) == {"two"}
    assert response.headers["x-ratchet-release"] == second
    record = record_of(gateway, response)
    assert record.release == second and record.attempts >= 2 and record.error is None


def test_timeouts_of_releases_are_swapped_with_the_configuration(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    gateway = start(config=config(release_timeouts={"first_byte": 0.1})).ready()
    response = gateway.ask("fault:hang")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")


@pytest.mark.parametrize("sampled", [True, False])
def test_each_attempt_has_a_span_that_its_engine_knows(
    settings: Settings, release: str, once: FailsOnce, start: Callable[..., Running], sampled: bool
) -> None:
    once.fault = "500"
    point(settings, release, once.url)
    with Collector() as collector:
        found = replace(settings, otlp_endpoint=collector.url)
        gateway = start(settings=found, config=config()).ready()
        parent = f"00-{'ab' * 16}-{'cd' * 8}-{'01' if sampled else '00'}"
        gateway.client.headers["traceparent"] = parent
        assert gateway.ask("x").status_code == 200
        sent = [headers["traceparent"].split("-") for headers in once.headers]
        assert [(s[1], s[3]) for s in sent] == [("ab" * 16, parent[-2:])] * 2
        assert len({s[2] for s in sent} | {"cd" * 8}) == 3
        if not sampled:
            return
        server, failed, good = until(lambda: collector.spans)
    assert [span.span_id.hex() for span in (failed, good)] == [s[2] for s in sent]
    assert {span.parent_span_id for span in (failed, good)} == {server.span_id}
    outcomes = [attributes(span)["ratchet.outcome"] for span in (failed, good)]
    assert outcomes == ["error", "ok"]
    assert attributes(good)["gen_ai.usage.output_tokens"] == 11
    assert attributes(good)["gen_ai.request.temperature"] == 0
    assert attributes(good)["gen_ai.prompt.name"] == "answer"
