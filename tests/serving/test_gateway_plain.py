"""Plain models through the whole gateway: keys, limits, guards, routing and the relay together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from contracts.errors import ConfigError
from contracts.settings import Settings
from resources import requests as request_log
from resources.keys import KeyStore
from serving.gateway.app import Gateway
from serving.gateway.config import GatewayConfig
from serving.gateway.limits.tokens import TokenCounter
from tests.serving.conftest import Running, events, until
from tests.serving.fake_engine import ANSWER, FakeEngine
from tests.serving.test_limits_tokens import folder  # noqa: F401

CARD = "4539 1488 0343 6467"
POLICIES = {
    "strict": {
        "input": {"pii": {"action": "redact"}, "secrets": {"action": "block"}},
        "output": {"pii": {"action": "redact"}, "secrets": {"action": "block"}},
    }
}


def configured(*urls: str, **more: Any) -> GatewayConfig:
    """A gateway whose model ``small`` stands at each of these addresses."""
    providers = {f"p{n}": {"url": url, "dialect": "vllm"} for n, url in enumerate(urls)}
    candidates = [
        {"provider": name, "model": "nano", "price": "nano"} for name in sorted(providers)
    ]
    value = {
        "routing": {
            "providers": providers,
            "models": [{"name": "small", "candidates": candidates, "policy": "least_loaded"}],
        },
        "prices": {"nano": {"input": 1.0, "output": 2.0}},
        "guards": {"policies": POLICIES},
        **more,
    }
    return GatewayConfig.model_validate(value)


@pytest.fixture
def plain(start: Callable[..., Running], own_engine: FakeEngine) -> Running:
    return start(config=configured(own_engine.url)).ready()


def post(running: Running, path: str = "chat/completions", key: str = "", **body: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": "small", **body}
    if path == "chat/completions":
        body.setdefault("messages", [{"role": "user", "content": "hello"}])
    return running.client.post(f"/v1/{path}", json=body, headers=headers)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_upstreams_bytes_are_relayed_as_they_are(
    plain: Running, own_engine: FakeEngine
) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "model": "nano",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    direct = httpx.post(f"{own_engine.url}/v1/chat/completions", json=body)
    through = post(plain, stream=True, stream_options={"include_usage": True})
    assert through.content == direct.content and b"[DONE]" in through.content
    assert through.headers["x-request-id"].startswith("resp-")
    whole = post(plain)
    assert whole.json()["choices"][0]["message"]["content"] == ANSWER
    assert whole.json()["usage"]["completion_tokens"] == 1


def test_every_kind_is_answered_and_engine_fields_are_taken_out(
    plain: Running, own_engine: FakeEngine
) -> None:
    assert post(plain, "completions", prompt="a").json()["choices"][0]["text"] == ANSWER
    assert post(plain, "embeddings", input=["a", "b"]).json()["data"][0]["embedding"]
    own_engine.bodies.clear()
    dangerous = {"priority": -9, "cache_salt": "mine", "kv_transfer_params": {}, "n": 2,
                 "chat_template": "{{ 1 }}", "vllm_xargs": {}, "prompt_embeds": "x"}  # fmt: skip
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    post(plain, response_format=schema, temperature=0.3, **dangerous)
    sent = own_engine.bodies[-1]
    assert set(sent) == {
        "model", "messages", "n", "temperature", "response_format", "stream", "cache_salt",
    }  # fmt: skip
    assert sent["model"] == "nano" and sent["response_format"] == schema
    assert len(sent["cache_salt"]) == 64  # ours


def test_prompts_are_counted_only_where_a_limit_could_be_near(
    start: Callable[..., Running], own_engine: FakeEngine, settings: Settings, folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = KeyStore.open(settings)
    rich, near, short = (
        store.create("acme", name, limits=limits).token
        for name, limits in (("rich", {"tokens_per_minute": 10**6}),
                             ("near", {"tokens_per_minute": 1000}),
                             ("short", {"max_prompt_tokens": 40}))
    )  # fmt: skip
    store.close()
    config = configured(own_engine.url).model_dump(by_alias=True)
    config["routing"]["models"][0]["candidates"][0]["tokenizer"] = str(folder)
    running = start(config=GatewayConfig.model_validate(config)).ready()
    counted = []
    count = TokenCounter._now
    monkeypatch.setattr(TokenCounter, "_now", lambda *a: counted.append(1) or count(*a))
    text = "the gateway of the guide " * 10  # 250 bytes, some 70 tokens
    message = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
    answer = post(running, key=rich, **message)
    assert answer.status_code == 200 and not counted
    row = until(lambda: request_log.find(settings, answer.headers["x-request-id"]))
    assert row.prompt_tokens == answer.json()["usage"]["prompt_tokens"]  # the engine's own
    # Once for each: at the door, because the bound is too near; afterwards, for want of a usage.
    assert post(running, key=near, **message).status_code == 200 and len(counted) == 1
    assert code(post(running, key=short, **message)) == (400, "context_length_exceeded")
    assert len(counted) == 2
    message["messages"][0]["content"] = "fault:no-usage " + text
    answer = post(running, key=rich, stream=True, **message)
    row = until(lambda: request_log.find(settings, answer.headers["x-request-id"]))
    assert len(counted) == 3 and 60 < row.prompt_tokens < 120


def test_tools_go_through(plain: Running, own_engine: FakeEngine) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="unused", max_retries=0)
    message = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "look"}],
        tools=[tool],  # type: ignore[list-item]
    ).choices[0].message  # fmt: skip
    assert message.tool_calls and message.tool_calls[0].function.name == "look"
    assert own_engine.bodies[-1]["tools"] == [tool]


@pytest.mark.parametrize(
    "body, where",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x\0"}]}, "messages[0].content"),
        ({"temperature": True}, "temperature"),
        ({"n": 99}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]},
            "messages[0].content[0]",
        ),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(plain_shared: Running, body: dict[str, Any], where: str) -> None:
    response = post(plain_shared, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == where


@pytest.fixture(scope="module")
def plain_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """For requests that never reach an engine."""
    root = tmp_path_factory.mktemp("plain")
    running = Running(
        Settings.from_env({"RATCHET_ROOT": str(root)}), config=configured("http://127.0.0.1:9")
    )
    yield running.ready()
    running.stop()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "small", "model": "other"}',
        b'{"model": "small", "temperature": NaN}',
        b'{"model": "small", "user": "\xff"}',
        b'{"model": "small", "user": "\\ud800"}',
        b'{"model": "small", "seed": ' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000,
        b"[" * 500_000,
        b'{"messages":[' + b"{}," * 200_000 + b"{}]}",
        b"",
        b"null",
    ],
    ids=["twice", "nan", "utf8", "half", "digits", "deep", "brackets", "count", "none", "null"],
)
def test_bytes_that_are_no_request_are_400(plain_shared: Running, raw: bytes) -> None:
    kind = {"content-type": "application/json"}
    response = plain_shared.client.post("/v1/chat/completions", content=raw, headers=kind)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_request")


def test_another_replica_answers_and_after_the_first_byte_nobody_else_does(
    start: Callable[..., Running],
) -> None:
    # With a pause the first event is out before the error comes; else it could still be retried.
    with FakeEngine(pause=0.05) as good, FakeEngine(pause=0.05) as bad:
        bad.fault = "500"
        running = start(config=configured(bad.url, good.url)).ready()
        answers = [post(running) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        bad.fault = good.fault = "error-mid"
        broken = post(running, stream=True)
        last = events(broken)[-1]
        assert broken.status_code == 200 and last["error"]["code"] == "engine_error"
        assert b"[DONE]" not in broken.content


def test_a_key_is_required_limited_and_billed(
    start: Callable[..., Running], own_engine: FakeEngine, settings: Settings
) -> None:
    store = KeyStore.open(settings)
    token = store.create("acme", "app", models=["small"], limits={"requests_per_minute": 3}).token
    other = store.create("acme", "other", models=["something-else"]).token
    running = start(config=configured(own_engine.url, auth={"required": True}))
    until(lambda: running.client.get("/readyz").status_code == 200)
    assert code(post(running)) == (401, "invalid_api_key")
    assert code(post(running, key=token + "x")) == (401, "invalid_api_key")
    assert code(post(running, key=other)) == (404, "model_not_found")
    good = post(running, key=token)
    assert good.status_code == 200 and good.headers["x-ratelimit-remaining-requests"] == "2"
    names = running.client.get("/v1/models", headers={"x-api-key": token}).json()["data"]
    assert [model["id"] for model in names] == ["small"]
    assert post(running, key=token).status_code == post(running, key=token).status_code == 200
    refused = post(running, key=token)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1


def test_an_answer_cannot_be_longer_than_what_was_reserved(
    start: Callable[..., Running], own_engine: FakeEngine, settings: Settings
) -> None:
    store = KeyStore.open(settings)
    counted = store.create("acme", "a", limits={"tokens_per_minute": 10_000}).token
    free = store.create("acme", "b").token
    running = start(config=configured(own_engine.url, requests={"max_tokens": 700}))
    until(lambda: post(running, key=counted).status_code == 200)
    assert own_engine.bodies[-1]["max_tokens"] == 700
    post(running, key=counted, max_tokens=5)
    assert own_engine.bodies[-1]["max_tokens"] == 5
    post(running, key=free)
    assert "max_tokens" not in own_engine.bodies[-1]


def test_guards_redact_block_and_hold_back(
    start: Callable[..., Running], own_engine: FakeEngine
) -> None:
    own_engine.answer = f"The card is {CARD}, keep it."
    running = start(config=configured(own_engine.url, guard="strict")).ready()
    messages = [{"role": "user", "content": f"my card is {CARD}"}]
    streamed = post(running, stream=True, messages=messages)
    assert "4539" not in own_engine.bodies[-1]["messages"][0]["content"]
    text = "".join(
        (chunk["choices"][0]["delta"].get("content") or "")
        for chunk in events(streamed)
        if chunk != "[DONE]" and chunk["choices"]
    )
    assert text == "The card is [CARD_1], keep it." and "4539" not in streamed.text
    whole = post(running, messages=messages)
    assert whole.json()["choices"][0]["message"]["content"] == text
    key = "ghp_" + "a8Kd02mZq1LxPv7RtYw3NcBf5HsJgE9u4TiO"
    secret = [{"role": "user", "content": f"use {key}"}]
    asked = len(own_engine.bodies)
    assert code(post(running, messages=secret)) == (400, "content_blocked")
    assert len(own_engine.bodies) == asked


def test_the_same_question_is_answered_once(plain: Running, own_engine: FakeEngine) -> None:
    for stream in (False, True):
        first = post(plain, temperature=0, stream=stream)
        asked = len(own_engine.bodies)
        again = post(plain, temperature=0, stream=stream)
        assert again.content == first.content and len(own_engine.bodies) == asked
        post(plain, temperature=0, stream=stream, max_tokens=7)
        post(plain, stream=stream)  # another try may say something else
        assert len(own_engine.bodies) == asked + 2
    own_engine.fault = "eof"
    broken = {"messages": [{"role": "user", "content": "break"}], "temperature": 0, "stream": True}
    assert b"[DONE]" not in post(plain, **broken).content
    own_engine.fault = ""
    assert b"[DONE]" in post(plain, **broken).content


def test_the_configuration_is_swapped_whole_or_not_at_all(
    start: Callable[..., Running], own_engine: FakeEngine, settings: Settings, tmp_path: Path
) -> None:
    path = settings.root / "serving" / "gateway.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(**more: Any) -> None:
        value = configured(own_engine.url).model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**value, **more}))
        new.replace(path)

    write()
    running = start(config=None).ready()
    assert post(running).status_code == 200
    write(auth={"required": "perhaps"})
    until(lambda: running.metric("ratchet_gateway_config_reloads_total", outcome="refused"))
    assert post(running).status_code == 200
    write(auth={"required": True})
    until(lambda: running.metric("ratchet_gateway_config_reloads_total", outcome="taken"))
    assert code(post(running)) == (401, "invalid_api_key")


def test_without_keys_other_machines_are_not_answered(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="ratchet keys create"):
        Gateway(settings, config=GatewayConfig(), host="0.0.0.0")
    Gateway(settings, config=GatewayConfig.model_validate({"auth": {"required": True}}), host="::")
    Gateway(settings, config=GatewayConfig(), host="::1")
