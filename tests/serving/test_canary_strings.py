"""Marked strings go in through every field; then every sink is searched for them.

Two kinds. A *shaped* canary is a real-looking key or an address of a person: no sink may hold it. A
*word* has no shape that a recogniser could know: only the texts of a release's request log and of
feedback may hold it, because they are what these logs are for. Each field has canaries of its own,
so that a leak says where it came in.
"""

from __future__ import annotations

import io
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracts.settings import Settings
from resources import feedback, releases, requests
from resources.keys import KeyStore
from tests.serving import fake_engine
from tests.serving.collector import Collector
from tests.serving.conftest import Running, until
from tests.serving.factory import build, point
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_gateway_plain import configured

HEADERS = (
    "x-session-id", "x-ratchet-feature", "cookie", "referer", "user-agent", "x-forwarded-for",
    "x-request-id", "openai-organization", "traceparent",
)  # fmt: skip
LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


class Canaries:
    """Makes marked strings and remembers where each goes in."""

    def __init__(self) -> None:
        self.shaped: dict[str, str] = {}
        self.words: dict[str, str] = {}

    def __call__(self, field: str) -> str:
        """A text with all kinds of canary for this field; what is searched for are their cores."""
        key = "".join(secrets.choice(LETTERS) for _ in range(36)) + "aB3"
        name = "canary" + secrets.token_hex(5)
        self.shaped[key] = self.shaped[name] = field
        return f"{self.word(field)} sk-proj-{key} {name}@corp-mail.com"

    def word(self, field: str) -> str:
        found = "zebra" + secrets.token_hex(6)
        self.words[found] = field
        return found

    def in_(self, data: str | bytes, words: bool = True) -> list[str]:
        """The fields whose canaries stand in ``data``."""
        text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
        marks = {**self.shaped, **(self.words if words else {})}
        return sorted({field for mark, field in marks.items() if mark in text})


class Watched:
    """A gateway all of whose sinks can be read."""

    def __init__(
        self, running: Running, engine: FakeEngine, collector: Collector, token: str
    ) -> None:
        self.running, self.engine, self.collector, self.token = running, engine, collector, token
        self.client, self.log = running.client, io.StringIO()


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def watched(
    request: pytest.FixtureRequest,
    settings: Settings,
    start: Callable[..., Running],
) -> Iterator[Watched]:
    """Everything at its loudest: loggers at DEBUG, the real exporter, a real collector. Without
    uvicorn's access log, as in production (``access_log=False``), and what this client logs."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setLevel(logging.DEBUG)
    names = ["", "ratchet", "uvicorn", "uvicorn.error", "asyncio", "aiohttp"]
    before = {name: logging.getLogger(name).level for name in names}
    path = releases.install(build(settings.root), settings.root, settings)
    token = KeyStore.open(settings).create("acme", "a key").token
    with FakeEngine() as engine, Collector() as collector:
        point(settings, path.name, engine.url)
        config = configured(engine.url, **getattr(request, "param", {"auth": {"required": True}}))
        running = start(config=config, settings=replace(settings, otlp_endpoint=collector.url))
        running.ready()
        running.client.headers["authorization"] = f"Bearer {token}"
        asked = {"model": "small", "input": "hello"}
        until(lambda: send(running.client, "embeddings", {}, asked).status_code == 200)
        handler.addFilter(lambda line: not line.name.startswith("http"))
        for name in names:
            logging.getLogger(name).setLevel(logging.DEBUG)
            if not name or not logging.getLogger(name).propagate:
                logging.getLogger(name).addHandler(handler)
        found = Watched(running, engine, collector, token)
        found.log = text
        try:
            yield found
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
                logging.getLogger(name).removeHandler(handler)


def sinks(watched: Watched, capfd: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """Name -> what it holds, as bytes. Parquet is compressed and is read below."""
    running = watched.running
    out, err = capfd.readouterr()
    found = {"log": watched.log.getvalue().encode(), "stdout": out.encode(), "stderr": err.encode()}
    found["metrics"] = running.client.get("/metrics").content
    found["spans"] = b"".join(item.SerializeToString() for item in watched.collector.requests)
    for path in running.settings.state_dir.rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            found[f"file {path.relative_to(running.settings.state_dir)}"] = path.read_bytes()
    return found


def everything(canaries: Canaries, token: str) -> Iterator[tuple[str, dict[str, str], Any]]:
    """(path, headers, body) with canaries in every field of every kind of request."""
    c = canaries
    good = {"authorization": f"Bearer {token}"}
    plain = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
    tool = {"type": "function", "function": {
        "name": "find", "description": c("tool description"),
        "parameters": {"type": "object", "description": c("tool parameters")}}}  # fmt: skip
    call = {"id": "c1", "type": "function", "function": {
        "name": "find", "arguments": json.dumps({"q": c("tool arguments")})}}  # fmt: skip
    whole = {
        "model": "small", "user": c("user"), "stop": [c.word("stop")], "tools": [tool],
        "messages": [
            {"role": "system", "content": c("system")},
            {"role": "user", "content": c("content"), "name": c.word("name")},
            {"role": "user", "content": [{"type": "text", "text": c("part")}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": c("tool result")},
        ],
        "metadata": {"k": c("metadata")},
    }  # fmt: skip
    for stream in (False, True):
        yield "chat/completions", good, {**whole, "stream": stream}
    yield "completions", good, {"model": "small", "prompt": c("prompt")}
    yield "embeddings", good, {"model": "small", "input": [c("input")]}
    for stream in (False, True):
        body = {"model": "stable", "messages": [{"role": "user", "content": c("question")}]}
        yield "chat/completions", good, {**body, "stream": stream}
    for field in HEADERS:
        yield "chat/completions", {**good, field: c(field)}, plain
    context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    state = f"vendor={c.word('tracestate')}"
    yield "chat/completions", {**good, "traceparent": context, "tracestate": state}, plain
    yield "chat/completions", {"authorization": f"Bearer {c('wrong key')}"}, plain
    yield "chat/completions", {"x-api-key": c("x-api-key")}, plain
    yield "chat/completions", {**good, "content-type": c.word("content-type")}, plain
    yield "chat/completions", good, {**plain, "model": c("model")}
    yield f"{c.word('path')}?q={c.word('query')}", good, plain
    yield f"chat/completions?{c.word('query')}={c.word('query')}", good, plain
    twice = c("duplicate key")
    for bad in (
        f'{{"model": "small", "{twice}": 1, "{twice}": 2}}',
        f'{{"model": "small", "messages": "{c("bad messages")}"}}',
        f'{{"model": "small", "messages": [{{"role": "{c("role")}", "content": 1}}]}}',
        f'{{"model": "{c("cut json")}',
        f'{{"model": "small", "messages": [], "{c("unknown field")}": NaN}}',
        f'{{"model": "small", "x": "{c("half a character")}\\ud800"}}',
        "[" * 2000 + c("deep") + "]" * 2000,
        f'{{"model": "small", "temperature": "{c("temperature")}", "messages": []}}',
    ):
        yield "chat/completions", good, bad.encode()


def send(client: httpx.Client, path: str, headers: dict[str, str], body: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        f"/v1/{path}", content=data, headers={"content-type": "application/json", **headers}
    )


def rows(running: Running) -> list[dict[str, Any]]:
    return [
        row
        for day in requests.days(running.settings)
        for row in requests.read_day(running.settings, day).to_pylist()
    ]


def ended(watched: Watched, count: int) -> None:
    """Wait until that many requests are in the log and their spans with the collector."""
    watched_metric = watched.running.metric
    until(lambda: watched_metric("ratchet_gateway_request_log_rows_total") >= count)
    until(lambda: watched_metric("ratchet_gateway_traces_exported_total") >= count)


def test_no_sink_holds_what_came_in(
    watched: Watched, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    running, token = watched.running, watched.token
    canaries.shaped[token.partition(".")[2]] = "the key's own secret"
    statuses = [send(running.client, *item).status_code for item in everything(canaries, token)]
    assert {200, 400, 401, 404} <= set(statuses) and 500 not in statuses
    assert statuses.count(200) > 10
    ended(watched, len(statuses) - 1)  # one path does not exist
    assert leaks(watched, canaries, capfd) == {}
    # The sinks are there, and the texts that a log is for are in it.
    logged = rows(running)
    assert len(logged) >= len(statuses) - 1
    questions = [row["question"] for row in logged if row["release"]]
    assert "question" in canaries.in_("".join(questions))
    assert {row["tenant"] for row in logged} == {"acme", ""}  # "": with a wrong key
    assert len(watched.collector.spans) > len(statuses)


def leaks(
    watched: Watched, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> dict[str, list[str]]:
    """Sink -> the fields whose canaries it holds; empty is right."""
    found = {}
    for name, data in sinks(watched, capfd).items():
        # Journals of the request log and of feedback hold words on purpose.
        words = not name.startswith(("file requests", "file feedback"))
        if fields := canaries.in_(data, words):
            found[name] = fields
    for row in rows(watched.running):
        text = json.dumps(row, ensure_ascii=False)
        kept = {**row, "question": "", "answer": ""} if row["release"] else row
        fields = canaries.in_(text, words=False) + canaries.in_(json.dumps(kept))
        if fields:
            found[f"request log, {row['response_id']}"] = fields
    return found


@pytest.mark.parametrize("where", ["upstream", "crash", "guard"])
def test_failures_tell_no_sink_what_was_said(
    watched: Watched,
    canaries: Canaries,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """An upstream's own words, and exceptions whose message and cause hold text."""
    running, said = watched.running, canaries("what failed says")
    if where == "upstream":
        real = fake_engine._refusal

        def refusal(fault: str) -> Any:
            from aiohttp import web

            if fault.startswith("echo"):
                status = int(fault[4:])
                return web.json_response(
                    {"error": {"message": said, "code": status}}, status=status
                )
            return real(fault)

        monkeypatch.setattr(fake_engine, "_refusal", refusal)
        asked = [f"fault:echo{status}" for status in (400, 401, 404, 429, 500, 503)]
    else:

        async def fail(*_: Any, **__: Any) -> Any:
            try:
                raise ValueError(said)
            except ValueError as error:
                raise RuntimeError(f"it was {said}") from error

        part: Any = running.gateway.services.router
        name = "open"
        if where == "guard":
            part, name = running.gateway.services.now.guards, "check_input"
        monkeypatch.setattr(type(part), name, fail)
        asked = ["hello"]
    for question in asked:
        for stream in (False, True):
            body = {"model": "small", "messages": [
                {"role": "user", "content": f"{question} {canaries('content')}"}]}  # fmt: skip
            response = send(running.client, "chat/completions", {}, {**body, "stream": stream})
            assert response.status_code >= 400
            if question != "fault:echo400":  # what is wrong with a request is its client's to know
                assert canaries.in_(response.content) == []
    ended(watched, 2 * len(asked))
    assert leaks(watched, canaries, capfd) == {}
    if where != "upstream":
        assert "RuntimeError" in watched.log.getvalue()  # the log says what happened, and where


def test_feedback_tells_no_sink_what_was_said(
    watched: Watched, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    running = watched.running
    answer = running.ask("What is fact 1?")
    response_id = answer.headers["x-ratchet-response-id"]
    ended(watched, 1)
    good = {"response_id": response_id, "thumb": "up",
            "comment": canaries("comment"), "edit": canaries("edit")}  # fmt: skip
    assert send(running.client, "feedback", {}, good).status_code == 200
    for field in ("thumb", "response_id", "surprise"):
        refused = send(running.client, "feedback", {}, {**good, field: canaries(field)})
        assert refused.status_code in (400, 404)
        assert canaries.in_(refused.content) == []
    assert leaks(watched, canaries, capfd) == {}
    day = response_id[5:9] + "-" + response_id[9:11] + "-" + response_id[11:13]
    (word,) = feedback.history(running.settings, day)
    assert canaries.in_(word.comment + word.edit) == ["comment", "edit"]  # their plain words


@pytest.mark.parametrize("stream", [False, True])
def test_texts_of_plain_models_are_kept_only_where_they_are_wanted(
    start: Callable[..., Running], own_engine: FakeEngine, canaries: Canaries, stream: bool
) -> None:
    """And then without what has a shape."""
    said = canaries("content")
    own_engine.answer = canaries("answer")
    for content in (False, True):
        running = start(config=configured(own_engine.url, logs={"content": content})).ready()
        body = {"model": "small", "messages": [{"role": "user", "content": said}]}
        answer = send(running.client, "chat/completions", {}, {**body, "stream": stream})
        name = answer.headers["x-ratchet-response-id"]
        row = until(lambda name=name, at=running: requests.find(at.settings, name))
        assert canaries.in_(row.model_dump_json(), words=False) == []
        assert canaries.in_(row.question) == (["content"] if content else [])
        assert canaries.in_(row.answer) == (["answer"] if content else [])


def test_the_search_can_fail(
    watched: Watched, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    """A leak into any sink is seen."""
    state = watched.running.settings.state_dir
    logging.getLogger("ratchet.gateway.anything").debug("a %s", canaries("log"))
    print(canaries("stderr"), file=sys.stderr)
    (state / "audit").mkdir(exist_ok=True)
    Path(state / "audit" / "x.jsonl").write_text(canaries("audit"))
    watched.running.gateway.metrics.tiers.labels(canaries("metric")).inc()
    found = leaks(watched, canaries, capfd)
    assert found["log"] == ["log"] and found["file audit/x.jsonl"] == ["audit"]
    assert found["metrics"] == ["metric"] and "stderr" in found["stderr"]
