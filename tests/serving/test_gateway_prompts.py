"""A gateway that tries two versions of a release's prompt against each other."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from contracts.settings import Settings
from resources import certification, releases
from resources import requests as request_log
from serving.gateway.cache.config import Cache
from serving.gateway.config import GatewayConfig
from serving.gateway.guards.policy import GuardsConfig
from tests.serving.conftest import Running, until
from tests.serving.factory import TEMPLATE, build, point
from tests.serving.fake_engine import FakeEngine

SECOND = TEMPLATE.replace("MARK", "of the second version, word for word and never told to anyone")


@pytest.fixture
def two(settings: Settings, own_engine: FakeEngine) -> str:
    """A deployed release with a canary prompt."""
    path = build(settings.root, versions={"v2": SECOND}, tags="stable: v1\ncanary: v2\n")
    release = releases.install(path, settings.root, settings).name
    point(settings, release, own_engine.url)
    certify(settings, release)
    return release


def certify(settings: Settings, release: str) -> None:
    """As if a release with the same model and the second version had passed."""
    held = releases.load(settings, release).prompts().get("answer", "v2")
    pair = {"model": "", "sha256": held.sha256}
    certification.path(settings).write_text(json.dumps([pair]))


def config(**weights: float) -> GatewayConfig:
    off = Cache.model_validate({"exact": {"enabled": False}})  # or the engine is asked once only
    return GatewayConfig(prompts={"answer": weights}, cache=off)


def ask(gateway: Running, session: str) -> httpx.Response:
    return gateway.client.post(
        "/v1/chat/completions",
        json={"model": "stable", "messages": [{"role": "user", "content": "Why?"}]},
        headers={"x-session-id": session} if session else {},
    )


def test_sessions_stick_and_prompt_header_record_and_metric_agree(
    settings: Settings, two: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    gateway = start(config=config(stable=50, canary=50)).ready()
    seen: dict[str, set[str]] = {}
    ids = []
    for n in range(24):
        response = ask(gateway, session := f"session {n % 8}")
        version = response.headers["x-ratchet-prompt"]
        system = own_engine.bodies[-1]["messages"][0]["content"]
        assert ("of the second version" in system) == (version == "answer/v2")
        seen.setdefault(session, set()).add(version)
        ids.append(response.headers["x-ratchet-response-id"])
    assert all(len(versions) == 1 for versions in seen.values())
    assert {version for versions in seen.values() for version in versions} == {
        "answer/v1", "answer/v2",
    }  # fmt: skip
    counted = {
        version: gateway.metric("ratchet_gateway_prompt_exposures_total", prompt_version=version)
        for version in ("answer/v1", "answer/v2")
    }
    assert sum(counted.values()) == 24
    experiment = gateway.client.get("/readyz").json()["prompt_experiment"]
    gateway.stop()
    records = [request_log.find(settings, response_id) for response_id in ids]
    assert {record.prompt_experiment for record in records if record} == {experiment}
    of = [record.prompt_version for record in records if record]
    assert {version: of.count(version) for version in counted} == counted


def test_only_answers_of_a_model_are_exposures(
    settings: Settings, two: str, start: Callable[..., Running]
) -> None:
    gateway = start(config=config(canary=1)).ready()
    response = gateway.ask("unrelated")
    assert response.headers["x-ratchet-prompt"] == "answer/v2"
    assert not gateway.metric("ratchet_gateway_prompt_exposures_total", prompt_version="answer/v2")
    gateway.stop()
    record = request_log.find(settings, response.headers["x-ratchet-response-id"])
    assert record is not None and record.refused and record.prompt_experiment == ""


def test_the_leak_guard_knows_the_version_that_was_rendered(
    settings: Settings, two: str, start: Callable[..., Running]
) -> None:
    """The engine gives away the canary's instructions."""
    words = (
        "Answer from the passages. (of the second version, word for word and never told to anyone)"
    )
    policies = GuardsConfig.model_validate(
        {"policies": {"tight": {"output": {"leak": {"words": 10}}}}}
    )
    with FakeEngine(answer=words) as engine:
        point(settings, two, engine.url)
        codes = {}
        for tag in ("stable", "canary"):
            tried = config(**{tag: 1}).model_copy(update={"guard": "tight", "guards": policies})
            gateway = start(config=tried).ready()
            codes[tag] = ask(gateway, "").status_code
            gateway.stop()
    assert codes["stable"] == 200 and codes["canary"] >= 400


def test_a_pointer_at_a_release_that_did_not_pass_is_not_followed(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    gateway = start().ready()
    root = settings.root / "next"
    failed = build(root, mark="failed", gate={"verdict": "FAIL"})
    point(settings, releases.install(failed, root, settings).name, own_engine.url)
    until(lambda: "not certified" in (gateway.client.get("/readyz").json()["switching"] or ""))
    answer = ask(gateway, "s")
    assert (answer.status_code, answer.headers["x-ratchet-release"]) == (200, release)


def test_an_unknown_version_leaves_the_releases_own_prompt_until_it_is_there(
    settings: Settings,
    release: str,
    own_engine: FakeEngine,
    start: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By reload and by deployment: the release leads, and the gateway never stops answering."""
    monkeypatch.setattr("serving.gateway.app.RELOAD_SECONDS", 0.02)
    path = settings.gateway_config
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompts": {"answer": {"stable": 1}}}))
    point(settings, release, own_engine.url)
    gateway = start(config=None).ready()
    ready = gateway.client.get("/readyz").json()
    assert ready["prompt_experiment"] and ready["prompt_problem"] is None
    path.write_text(json.dumps({"prompts": {"answer": {"canary": 1}}}))
    until(lambda: gateway.client.get("/readyz").json()["prompt_problem"])
    ready = gateway.client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["prompt_experiment"] is None
    assert "no version or tag 'canary'" in ready.json()["prompt_problem"]
    assert ask(gateway, "s").headers["x-ratchet-prompt"] == "answer/v1"
    root = settings.root / "next"
    built = build(root, versions={"v2": SECOND}, tags="stable: v1\ncanary: v2\n")
    following = releases.install(built, root, settings).name
    point(settings, following, own_engine.url)
    until(lambda: "has not passed" in gateway.client.get("/readyz").json()["prompt_problem"])
    assert ask(gateway, "s").headers["x-ratchet-prompt"] == "answer/v1"
    certify(settings, following)  # another release with that version passed: no restart is needed
    until(lambda: gateway.client.get("/readyz").json()["prompt_experiment"])
    assert ask(gateway, "s").headers["x-ratchet-prompt"] == "answer/v2"
    path.write_text(json.dumps({"prompts": {"answer": {"canary": -1}}}))
    until(lambda: gateway.metric("ratchet_gateway_config_reloads_total", outcome="refused"))
    assert ask(gateway, "s").headers["x-ratchet-prompt"] == "answer/v2"
