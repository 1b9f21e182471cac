"""Clients that try to pay less, to be somebody else or to reach further; docs/faults.md."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.serving.conftest import events, until
from tests.serving.faults import (  # noqa: F401
    PATH,
    World,
    chat,
    request,
    status,
    whole_world,
    world,
)


@pytest.mark.parametrize(
    "options",
    [
        {"include_usage": False},
        {},
        None,
        {"include_usage": True, "continuous_usage_stats": True},
    ],
)
def test_a_stream_cannot_hide_what_it_used(world: World, options: Any) -> None:  # noqa: F811
    """The gateway asks for the usage itself, and shows it only to who asked for it."""
    token, key_id = next(world.keys)
    response = world.post(key=token, model=world.one(), stream=True, stream_options=options)
    assert world.engine.bodies[-1]["stream_options"] == {"include_usage": True}
    found = [chunk for chunk in events(response) if chunk != "[DONE]" and chunk.get("usage")]
    assert bool(found) == bool(options and options.get("include_usage"))
    record = world.record_of(response)
    assert not record.tokens_estimated and record.prompt_tokens == 20
    assert world.account(key_id).tokens.total == 20 + (record.completion_tokens or 0)


@pytest.mark.parametrize(
    "path, body, answers",
    [
        ("chat/completions", {"n": 4}, 4),
        ("completions", {"prompt": "x", "n": 3}, 3),
        ("completions", {"prompt": "x", "best_of": 5, "n": 2}, 5),
        ("completions", {"prompt": ["x", "y", "z"], "n": 2}, 6),
        ("chat/completions", {"max_completion_tokens": 1_000, "max_tokens": 1}, 1),
    ],
)
def test_every_answer_that_may_come_is_reserved(
    world: World, path: str, body: dict[str, Any], answers: int  # noqa: F811
) -> None:  # fmt: skip
    token, key_id = next(world.keys)
    given: dict[str, Any] = {"model": world.patient(), "max_tokens": 1_000, **body}
    if path == "chat/completions":
        given["messages"] = [{"role": "user", "content": "x"}]
    world.engine.fault = "hang"
    data = request(given, f"authorization: Bearer {token}", path=f"/v1/{path}")
    with world.send(data):
        until(lambda: world.engine.open == 1)
        account = world.account(key_id)
        assert answers * 1_000 <= account.tokens.total < answers * 1_000 + 200
        assert account.held >= answers * 1_000 * 2_000  # 2 per million, in billionths


def test_of_two_limits_the_engine_gets_the_one_that_is_reserved(world: World) -> None:  # noqa: F811
    world.post(model=world.one(), max_completion_tokens=5, max_tokens=50_000)
    sent = world.engine.bodies[-1]
    assert sent["max_completion_tokens"] == 5 and "max_tokens" not in sent


@pytest.mark.parametrize(
    "body, code",
    [
        ({"max_tokens": 1 << 31}, 429),
        ({"max_completion_tokens": 1 << 31}, 429),
        ({"max_tokens": 1 << 40}, 400),
        ({"max_tokens": -1}, 400),
        ({"n": 16, "max_tokens": 10_000}, 429),
        ({"n": 17}, 400),
        ({"n": 0}, 400),
    ],
)
def test_more_than_a_key_may_is_refused_before_the_engine(
    world: World, body: dict[str, Any], code: int  # noqa: F811
) -> None:  # fmt: skip
    token, key_id = next(world.keys)
    response = world.post(key=token, model=world.one(), **body)
    assert response.status_code == code and world.engine.bodies == []
    if code == 429:
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert world.account(key_id).tokens.total == 0


def test_fields_that_are_the_engines_business_do_not_reach_it(world: World) -> None:  # noqa: F811
    fields = {
        "priority": -100, "cache_salt": "theirs", "ignore_eos": True, "min_tokens": 9_999,
        "prompt_logprobs": 20, "use_beam_search": True, "truncate_prompt_tokens": 1,
        "chat_template": "{{ ''.__class__ }}", "chat_template_kwargs": {"x": 1},
        "kv_transfer_params": {"remote_host": "10.0.0.1"}, "documents": [{"url": "http://x"}],
        "mm_processor_kwargs": {}, "guided_regex": "(a+)+$", "request_id": "mine",
        "add_special_tokens": False, "stop_token_ids": [], "logits_processors": ["os.system"],
    }  # fmt: skip
    for model in (world.one(), "stable"):
        world.engine.bodies.clear()
        assert world.post(model=model, **fields).status_code == 200
        sent = world.engine.bodies[-1]
        assert {name: sent[name] for name in fields if name in sent} in (
            {},
            {"cache_salt": sent.get("cache_salt")},
        )
        assert sent.get("cache_salt") != "theirs"


@pytest.mark.parametrize("why", ["revoked", "expired", "wrong", "unknown", "malformed", "long",
                                 "injected"])  # fmt: skip
def test_a_key_that_is_no_good_learns_nothing(world: World, why: str) -> None:  # noqa: F811
    """One answer for all, before a byte of the body is here."""

    def answer(token: str) -> tuple[int, bytes]:
        head = request(b"", f"authorization: Bearer {token}", path=PATH)
        with world.send(head.replace(b"content-length: 0", b"content-length: 1000")) as client:
            found = client.recv(1 << 16)
        return status(found), re.sub(rb"resp-[0-9a-f-]+|date: [^\r]+", b"", found)

    expected = answer("rk_000000000000.none")
    assert expected[0] == 401 and b'"code": "invalid_api_key"' in expected[1]
    assert answer(world.wrong[why]) == expected


@pytest.mark.parametrize("header", ["x-session-id", "x-ratchet-feature"])
def test_names_in_headers_stay_names(world: World, header: str) -> None:  # noqa: F811
    """What could end a line, a label or a field is refused; nothing comes back in a header."""
    for value, code in (
        (b"a\r\nset-cookie: x=1", 200),  # the parser's: that is a header of its own
        (b"a\nb", 400),
        (b"a\rb", 400),
        (b"a\0b", 400),
        (b"a\x1b[31mb", 400),
        (b"a\x85b", 400),
        (b"a" * 129, 400),
        (b'a"} 1', 200),
    ):
        data = request(chat(world.one()), "connection: close", "x-here: y")
        data = data.replace(b"x-here: y", header.encode() + b": " + value)
        found, answer = world.exchange(data)
        assert found == code, (value, answer)
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"set-cookie" not in head and b'a"}' not in head


def test_labels_are_bounded_and_logs_have_no_line_of_a_clients(
    world: World, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    client = world.running.client

    def series() -> set[str]:
        """Series by name and labels. Only a feature may be a client's word: a slug, and of those
        the first fifty (test_telemetry.py)."""
        text = re.sub(r'feature="invented-\d+"', 'feature="f"', client.get("/metrics").text)
        assert "invented" not in text
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"}

    def invent(n: int) -> None:
        fake = f"invented-{n}\n2026-01-01 ERROR ratchet: invented"
        world.post(model=fake)
        world.post(model="one-119", user=fake, headers={"x-session-id": f"invented-{n}"})
        world.post(model="one-119", headers={"x-ratchet-feature": f"invented-{n}"})
        client.post(f"/v1/invented-{n}%0aERROR")
        world.post(model=f"invented-{n}", key=f"rk_invented{n}.x")

    invent(0)
    before = series()
    for n in range(1, 12):
        invent(n)
    assert series() == before
    assert "invented" not in caplog.text
    folder = world.settings.requests_dir
    lines = [line for path in folder.rglob(".*.jsonl") for line in path.read_text().splitlines()]
    assert lines and all(line.startswith("{") and line.endswith("}") for line in lines)


PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
    {"type": "image_url", "image_url": "http://127.0.0.1:1/"},
    {"type": "input_image", "image_url": "file:///etc/passwd"},
    {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": "http://[::1]/"}},
    {"type": "video_url", "video_url": {"url": "http://10.0.0.1/"}},
    {"type": "file", "file": {"file_id": "../../etc/passwd"}},
    {"type": "text", "text": "x", "image_url": {"url": "http://127.0.0.1:1/"}},
]


@pytest.mark.parametrize("model", ["one-119", "stable"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part["type"])
def test_no_address_of_a_clients_reaches_an_engine(
    world: World, part: dict[str, Any], model: str  # noqa: F811
) -> None:  # fmt: skip
    """Media parts are refused, and what is smuggled beside a text is dropped."""
    response = world.post(model=model, messages=[{"role": "user", "content": [part]}])
    if part["type"] == "text":
        assert response.status_code == 200
        assert "url" not in str(world.engine.bodies[-1])
    else:
        assert response.json()["error"]["code"] == "unsupported_parameter"
        assert world.engine.bodies == []


def test_who_a_client_says_it_is_stays_here(world: World) -> None:  # noqa: F811
    """Hop-by-hop headers, identities, other hosts and credentials; trace context goes on."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ours = {"traceparent": trace}
    theirs = {
        "x-request-id": "mine", "x-forwarded-for": "10.0.0.1", "x-forwarded-host": "evil",
        "x-forwarded-proto": "https", "x-real-ip": "10.0.0.1", "forwarded": "for=10.0.0.1",
        "via": "1.1 evil", "cookie": "a=b", "x-api-key": "sk-mine", "authorization": "Bearer sk-x",
        "proxy-authorization": "Basic x", "x-portkey-custom-host": "http://10.0.0.1",
        "x-upstream-url": "http://10.0.0.1", "x-user-id": "admin", "x-tenant": "other",
        "te": "trailers", "x-vllm-priority": "9", "openai-organization": "org", "referer": "x",
        "host": "evil.example", "user-agent": "canary-agent", "x-session-id": "canary-session",
        "x-data-parallel-rank": "7",
    }  # fmt: skip
    for model in (world.one(), "stable"):
        world.engine.headers.clear()
        response = world.post(model=model, headers={**ours, **theirs})
        assert response.status_code == 200
        sent = {name.lower(): value for name, value in world.engine.headers[-1].items()}
        for name, value in theirs.items():
            assert sent.get(name) != value, name
        assert sent["x-request-id"] == response.headers["x-request-id"] != "mine"
        assert set(sent) <= {
            "host", "content-type", "content-length", "accept", "accept-encoding", "user-agent",
            "x-request-id", "traceparent", "tracestate",
        }  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "TRACE"])
def test_there_is_no_back_door(world: World, method: str) -> None:  # noqa: F811
    """Nothing that runs a command, renders a template, tries a connection or shows a setting."""
    for path in (
        "/mcp", "/v1/mcp", "/sse", "/prompts/test", "/test/connection", "/health/test_connection",
        "/config", "/admin", "/keys", "/key/generate", "/reload", "/debug", "/shutdown",
        "/v1/load_lora_adapter", "/v1/files", "/server_info", "/sleep", "/collective_rpc",
    ):  # fmt: skip
        response = world.running.client.request(method, path)
        assert response.status_code == 404, path
    assert world.engine.bodies == []
