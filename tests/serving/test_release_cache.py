"""Answers of releases out of the cache: who shares one, and that a replay is the answer again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from contracts.records import REFUSAL
from contracts.settings import Settings
from resources import releases
from resources import requests as request_log
from resources.keys import KeyStore
from resources.versions import Store
from serving.gateway.cache import Cache
from serving.gateway.cache.semantic import SemanticTier
from serving.gateway.config import GatewayConfig
from tests.serving.cache_requests import Table, edge
from tests.serving.conftest import Running, events, until
from tests.serving.factory import TEMPLATE, build, point
from tests.serving.fake_engine import ANSWER, FakeEngine
from tests.serving.faults import at_once, on_loop
from tests.serving.test_gateway_prompts import certify
from tests.serving.test_gateway_switch import ECHO, two

EMAIL = "Ask jane.roe@corp-mail.com. [1]"
REDACTS = {"output": {"pii": {"action": "redact"}}}


@pytest.fixture
def cached(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> Running:
    """A gateway as it is without a configuration file: the exact cache is on."""
    point(settings, release, own_engine.url)
    return start(config=GatewayConfig()).ready()


def record_of(gateway: Running, response: Any) -> Any:
    name = response.headers["x-ratchet-response-id"]
    return until(lambda: request_log.find(gateway.settings, name))


def hide(settings: Settings, *documents: str) -> None:
    """Publish an index without these documents."""
    store = Store(settings)
    with store.locked():
        entry = {"version": "v", "path": "indexes/v", "tombstones": [*documents], "md5": "0" * 32}
        store.move({**entry, "event": "publish", "previous": None})


@pytest.mark.parametrize(
    "how",
    [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}],
    ids=["whole", "stream", "usage"],
)
def test_a_replay_is_what_the_first_client_got(
    cached: Running, own_engine: FakeEngine, how: dict[str, Any]
) -> None:
    first, again = cached.ask("What is fact 1?", **how), cached.ask("What is fact 1?", **how)
    assert len(own_engine.bodies) == 1
    ids = [response.headers["x-ratchet-response-id"] for response in (first, again)]
    assert ids[0] != ids[1] and again.text == first.text.replace(ids[0], ids[1])
    for name in ("content-type", "x-ratchet-release", "x-ratchet-prompt"):
        assert again.headers[name] == first.headers[name]
    last = events(again)[-2 - ("stream_options" in how)] if how else again.json()
    assert [c["n"] for c in last["citations"]] == [1] and last["release"]
    one, two_ = record_of(cached, first), record_of(cached, again)
    assert (one.cached, two_.cached, two_.attempts, two_.provider) == ("", "exact", 0, "")
    for name in ("answer", "cited", "chunk_ids", "scores", "refused", "prompt_version", "release"):
        assert getattr(two_, name) == getattr(one, name), name
    assert two_.answer == ANSWER and two_.cited == [1] and len(two_.chunk_ids) == 3
    assert (two_.prompt_tokens, two_.completion_tokens, two_.ttft_ms) == (None, None, None)


def test_effective_parameters_decide(cached: Running, own_engine: FakeEngine) -> None:
    """What a client leaves out is what the release takes; what it may not raise is not raised."""
    cached.ask("x")
    same_as: list[dict[str, Any]] = [
        {"temperature": 0}, {"max_tokens": 96}, {"max_completion_tokens": 5000}, {"user": "me"},
        {"n": 1}, {"stop": None},
    ]  # fmt: skip
    for same in same_as:
        cached.ask("x", **same)
    assert len(own_engine.bodies) == 1
    others: list[dict[str, Any]] = [
        {"max_tokens": 95}, {"top_p": 0.5}, {"seed": 1}, {"stop": "b"}, {"stop": ["a", "b"]},
              {"presence_penalty": 1}, {"frequency_penalty": 1}, {"model": "ratchet"},
              {"messages": [{"role": "user", "content": "x "}]}, {"stream": True}]  # fmt: skip
    for other in others:
        cached.ask("x", **other)
    assert len(own_engine.bodies) == 1 + len(others)
    for _ in range(2):  # worded otherwise each time
        cached.ask("x", temperature=0.7)
    assert len(own_engine.bodies) == 3 + len(others)


def test_tenants_share_nothing_and_keys_of_one_do(
    cached: Running, settings: Settings, own_engine: FakeEngine
) -> None:
    store = KeyStore.open(settings)
    tokens = [store.create(tenant, "k").token for tenant in ("acme", "acme", "other")]
    until(lambda: cached.gateway.services.authenticator.problem is None)
    asked = []
    for token in tokens:
        cached.client.headers["authorization"] = f"Bearer {token}"
        until(lambda: cached.ask("x").status_code == 200)
        asked.append(len(own_engine.bodies))
    assert asked == [1, 1, 2]


def test_a_deleted_document_is_never_answered_from_the_cache(
    cached: Running, settings: Settings, own_engine: FakeEngine
) -> None:
    def shown() -> list[str]:
        response = cached.ask("What is fact 1?")
        return [c["path"] for c in response.json()["citations"]]

    assert shown() == shown() == ["page1.md"] and len(own_engine.bodies) == 1
    hide(settings, "docs:page1.md")
    assert shown() == shown() == ["page2.md"] and len(own_engine.bodies) == 2
    assert "Fact 1 " not in own_engine.bodies[1]["messages"][0]["content"]
    hide(settings, "docs:page1.md", "docs:page2.md")
    assert shown() == ["page3.md"] and len(own_engine.bodies) == 3
    hide(settings, "docs:not-of-this-release.md")
    assert shown() == ["page1.md"] and len(own_engine.bodies) == 3  # as before


def test_releases_share_nothing(settings: Settings, start: Callable[..., Running]) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        point(settings, first, a.url)
        gateway = start(config=GatewayConfig()).ready()

        def answered_by(release: str) -> str:
            until(lambda: gateway.client.get("/readyz").json()["release"] == release)
            response = gateway.ask("x")
            assert response.json()["release"] == response.headers["x-ratchet-release"] == release
            return str(response.json()["choices"][0]["message"]["content"])

        assert answered_by(first) == ECHO.format(mark="one") % "one"
        point(settings, second, b.url)
        assert answered_by(second) == ECHO.format(mark="two") % "two"
        point(settings, first, a.url)
        assert answered_by(first) == ECHO.format(mark="one") % "one"
        assert (len(a.bodies), len(b.bodies)) == (1, 1)


def test_what_another_release_answered_is_not_kept_as_the_first_ones(
    settings: Settings, start: Callable[..., Running]
) -> None:
    """The first engine dies over the prompt and the request runs again on the new release; back on
    the first one the question is asked anew."""
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "two") as b, FakeEngine(answer=ECHO % "one") as again:
        with FakeEngine(answer=ECHO % "one") as a:
            point(settings, first, a.url)
            gateway = start(config=GatewayConfig()).ready()
            a.fault = "hang-body"
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(gateway.ask, "x")
                until(lambda: a.open == 1)
                point(settings, second, b.url)
                until(lambda: gateway.client.get("/readyz").json()["release"] == second)
                a.stop()
                assert answer.result().json()["release"] == second
        assert (
            gateway.ask("x").json()["release"] == second and len(b.bodies) == 1
        )  # kept as its own
        point(settings, first, again.url)
        until(lambda: gateway.client.get("/readyz").json()["release"] == first)
        assert gateway.ask("x").json()["release"] == first and len(again.bodies) == 1


def test_versions_of_a_prompt_share_nothing(
    settings: Settings, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    path = build(settings.root, versions={"v2": TEMPLATE.replace("MARK", "v2")})
    release = releases.install(path, settings.root, settings).name
    point(settings, release, own_engine.url)
    certify(settings, release)
    value = {"prompts": {"answer": {"v1": 1, "v2": 1}}}
    gateway = start(config=GatewayConfig.model_validate(value)).ready()
    seen: dict[str, set[str]] = {}
    for session in range(20):
        gateway.client.headers["x-session-id"] = f"s{session}"
        response = gateway.ask("x")
        record = record_of(gateway, response)
        seen.setdefault(response.headers["x-ratchet-prompt"], set()).add(record.cached)
        assert record.prompt_version == response.headers["x-ratchet-prompt"]
    assert seen == {"answer/v1": {"", "exact"}, "answer/v2": {"", "exact"}}
    assert len(own_engine.bodies) == 2
    shown = sum(
        gateway.metric("ratchet_gateway_prompt_exposures_total", prompt_version=version)
        for version in seen
    )
    assert shown == 20  # whoever gets it from the cache has seen it too


@pytest.mark.parametrize("stream", [False, True])
def test_the_gateways_own_refusal_is_told_again_as_one(
    cached: Running, own_engine: FakeEngine, stream: bool
) -> None:
    found = [cached.ask("something unrelated", stream=stream) for _ in range(2)]
    assert all(REFUSAL in response.text for response in found) and own_engine.bodies == []
    records = [record_of(cached, response) for response in found]
    assert [(r.refused, r.answer, r.cached) for r in records] == [
        (True, REFUSAL, ""), (True, REFUSAL, "exact")]  # fmt: skip
    assert cached.metric("ratchet_gateway_refusals_total", by="gateway") == 2


@pytest.mark.parametrize(
    ("fault", "policy"), [("eof", {}), ("error-mid", {}), ("", REDACTS), ("", "personal")]
)
def test_what_is_not_whole_or_not_everybodys_is_not_kept(
    settings: Settings, release: str, start: Callable[..., Running], fault: str, policy: Any
) -> None:
    personal = policy == "personal"
    value = {
        "guard": "p", "guards": {"policies": {"p": {} if personal else policy}},
        "cache": {"personal": ["p"] if personal else []},
    }  # fmt: skip
    with FakeEngine(answer=ANSWER if personal else EMAIL) as engine:
        point(settings, release, engine.url)
        gateway = start(config=GatewayConfig.model_validate(value)).ready()
        engine.fault, engine.pause = fault, 0.002
        for _ in range(2):
            gateway.ask("x", stream=True)
        assert len(engine.bodies) == 2
        engine.fault = ""
        assert gateway.ask("x", stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_many_who_ask_the_same_at_once_ask_once(
    cached: Running, own_engine: FakeEngine, stream: bool
) -> None:
    own_engine.pause = 0.02
    found = at_once(20, lambda n: cached.ask("x", stream=stream))
    assert {response.status_code for response in found} == {200} and len(own_engine.bodies) == 1
    ids = [response.headers["x-ratchet-response-id"] for response in found]
    assert len(set(ids)) == 20
    assert all(name in response.text for name, response in zip(ids, found, strict=True))
    texts = [r.text.replace(name, "") for name, r in zip(ids, found, strict=True)]
    assert len(set(texts)) == 1


def test_a_question_that_means_the_same_gets_the_same_citations(
    cached: Running, own_engine: FakeEngine
) -> None:
    services = cached.gateway.services
    block = {"enabled": True, "threshold": 0.9, "verify": 0, "budget_ms": 5000}
    whole = Cache.model_validate({"semantic": block})

    async def turn_on() -> None:
        services.cache.semantic = SemanticTier(whole.semantic, Table(), edge, services.metrics)
        services.cache.configure(whole)

    async def written() -> None:
        assert services.cache.semantic is not None
        await services.cache.semantic.flush()

    def citations(response: Any) -> Sequence[Any]:
        return response.json()["citations"]  # type: ignore[no-any-return]

    on_loop(cached, turn_on())
    first = cached.ask("How do I pay for it?")
    on_loop(cached, written())
    near = cached.ask("How can I pay for it?")
    assert len(own_engine.bodies) == 1 and citations(near) == citations(first) != []
    assert near.json()["id"] == near.headers["x-ratchet-response-id"]
    record = record_of(cached, near)
    assert (record.cached, record.answer) == ("semantic", ANSWER)
    assert record.question == "How can I pay for it?" and record.cited == [1]
    cached.ask("How can I pay for 2?")  # a number that is not in the other
    assert len(own_engine.bodies) == 2
