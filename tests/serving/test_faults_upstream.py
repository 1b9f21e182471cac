"""Upstreams that hang, refuse, break and babble, against the whole gateway; docs/faults.md.

Plain models; the same faults of a release's engine stand in test_gateway_faults.py.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import pytest

from serving.gateway.sse import Frames
from tests.serving.conftest import events, until
from tests.serving.faults import (  # noqa: F401
    World,
    at_once,
    chat,
    config,
    on_loop,
    request,
    whole_world,
    world,
)

#: Fault, and what a client of a lone engine is told.
BEFORE = {
    "500": (502, "engine_error"),
    "html": (502, "engine_error"),
    "503-page": (502, "engine_error"),
    "503": (503, "engine_overloaded"),
    "429": (503, "engine_overloaded"),
    "429-wait": (503, "engine_overloaded"),
    "401": (502, "engine_error"),
    "404": (502, "engine_error"),
    "context": (400, "context_length_exceeded"),
    "redirect": (502, "engine_error"),
    "reset-first": (502, "engine_unreachable"),
    "hang": (504, "engine_timeout"),
}
MIDDLE = {
    "error-mid": ("engine_error", "error"),
    "overloaded-mid": ("engine_overloaded", "saturated"),
    "stall-mid": ("engine_timeout", "timeout"),
    "reset-mid": ("engine_disconnected", "disconnected"),
    "eof": ("engine_disconnected", "disconnected"),
}
ODD = ["crlf", "comments", "split", "multi-line", "giant", "no-usage", "bare-end"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE)
def test_before_the_first_byte_there_is_an_honest_status(
    world: World, fault: str, stream: bool  # noqa: F811
) -> None:  # fmt: skip
    token, key_id = next(world.keys) if fault == "500" else ("", "")
    response = world.post(f"fault:{fault}", key=token, model=world.one(), stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == BEFORE[fault]
    assert error["request_id"] == response.headers["x-request-id"]
    assert "secret traceback" not in response.text and "sk-sec" not in response.text
    if fault == "429-wait":
        assert response.headers["retry-after"] == "1"
    record = world.record_of(response)
    assert (record.status, record.error) == BEFORE[fault]
    if token:
        assert world.account(key_id).tokens.total == 0  # nothing came of it, nothing is paid


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["500", "503", "429", "hang", "reset-first", "error-200", "401"])
def test_another_engine_answers_what_failed_before_the_first_byte(
    world: World, fault: str, stream: bool  # noqa: F811
) -> None:  # fmt: skip
    world.engine.fault = "error-first" if fault == "error-200" and stream else fault
    response = world.post(model=world.two(), stream=stream)
    assert response.status_code == 200 and world.other.bodies
    record = world.record_of(response)
    assert (record.provider, record.error, record.tokens_estimated) == ("p1", None, False)
    assert record.attempts >= 2


@pytest.mark.parametrize("fault", MIDDLE)
def test_after_the_first_byte_there_is_one_error_and_nobody_else_is_asked(
    world: World, fault: str  # noqa: F811
) -> None:  # fmt: skip
    token, key_id = next(world.keys)
    code, outcome = MIDDLE[fault]
    before = world.outcomes(outcome)
    world.engine.fault = fault
    world.engine.pause = 0.005  # else an error may come together with the first byte
    response = world.post(key=token, model=world.two(), stream=True)
    *chunks, last = events(response)
    assert response.status_code == 200 and last["error"]["code"] == code
    assert response.text.count('"error"') == 1 and "[DONE]" not in response.text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert len(world.engine.bodies) == 1 and not world.other.bodies
    until(lambda: world.outcomes(outcome) == before + 1)  # the breaker hears of it
    record = world.record_of(response)
    assert record.error == code and record.tokens_estimated
    used = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
    assert record.completion_tokens == 2 and world.account(key_id).tokens.total == used
    assert record.cost > 0


@pytest.mark.parametrize(
    "fault, code",
    [
        ("error-200", "engine_error"),
        ("html-200", "engine_malformed_stream"),
        ("cut", "engine_disconnected"),
        ("stall-mid", "engine_timeout"),
    ],
)
def test_a_200_that_is_no_answer_is_an_error(world: World, fault: str, code: str) -> None:  # noqa: F811
    response = world.post(f"fault:{fault}", model=world.one())
    assert response.status_code >= 500 and response.json()["error"]["code"] == code
    assert world.record_of(response).answer == ""


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("fault", ODD)
def test_odd_streams_reach_the_client_as_they_are(
    world: World, fault: str, guarded: bool  # noqa: F811
) -> None:  # fmt: skip
    """Byte for byte without a guard; the same text, and an end, with one that may change it."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    model = world.one()
    body = chat("nano", f"fault:{fault}", **options)
    direct = httpx.post(f"{world.engine.url}/v1/chat/completions", json=body)
    key = world.guarded if guarded else ""
    through = world.post(f"fault:{fault}", model=model, key=key, **options)
    if not guarded:
        assert through.content == direct.content
    elif fault == "giant":
        assert events(through)[-1]["error"]["code"] == "engine_malformed_stream"
        return
    else:
        assert text(through) == text(direct) and "[DONE]" in through.text
    record = world.record_of(through)
    assert record.error is None
    assert record.tokens_estimated == (fault == "no-usage")
    assert (record.completion_tokens or 0) > 5


def text(response: httpx.Response) -> str:
    """What a stream says."""
    frames = [frame for frame in Frames().feed(response.content) if frame.data and not frame.done]
    chunks = [frame.json() for frame in frames]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_a_connection_that_is_never_made(world: World) -> None:  # noqa: F811
    """A listener whose queue is full drops further SYNs, as a firewall does: the next engine is
    asked after the connection's own deadline."""
    router = world.running.gateway.services.router
    before = router.config
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        silent = config([f"http://127.0.0.1:{address[1]}", world.other.url]).routing
        try:
            _configure(world, silent)
            began = time.monotonic()
            lone = world.post(model="one-118")
            assert lone.json()["error"]["code"] == "engine_unreachable"
            assert world.post(model="two-118").status_code == 200
            assert 0.2 <= time.monotonic() - began < 5
        finally:
            _configure(world, before)
            for filler in fillers:
                filler.close()


def _configure(world: World, routing: Any) -> None:  # noqa: F811
    async def swap() -> None:
        world.running.gateway.services.router.configure(routing)

    on_loop(world.running, swap())


def test_the_breaker_opens_and_lets_one_request_try(world: World) -> None:  # noqa: F811
    model = world.patient()
    world.engine.fault = "500"
    failed = [world.post(model=model) for _ in range(6)]
    assert [response.status_code for response in failed] == [502] * 6
    asked = len(world.engine.bodies)
    alone = world.post(model=model)
    assert alone.json()["error"]["code"] == "engine_unreachable"
    assert int(alone.headers["retry-after"]) >= 1
    assert len(world.engine.bodies) == asked  # left alone
    # After the pause one request, and only one, is let through to an engine that is slow to answer.
    world.engine.fault, world.engine.pause = "", 0.02
    until(lambda: world.post(model=model, stream=True).status_code == 200, 5)
    assert len(world.engine.bodies) == asked + 1
    world.engine.pause = 0.0
    assert world.post(model=model).status_code == 200


def test_of_many_at_once_one_is_the_probe(world: World) -> None:  # noqa: F811
    model = world.patient()
    world.engine.fault = "500"
    for _ in range(6):
        world.post(model=model)
    asked = len(world.engine.bodies)
    replica = world.running.gateway.services.router.routes[model].replicas[0]
    until(lambda: replica.health.breaker.ready(time.monotonic()))
    world.engine.fault = "hang"
    with world.send(request(chat(model), "x-ratchet-feature: probe")):
        until(lambda: world.engine.open == 1)
        found = at_once(8, lambda n: world.post(model=model))
        assert {response.status_code for response in found} == {502}
        assert len(world.engine.bodies) == asked + 1
    # The probe's client has left, which says nothing: the next one may try.
    until(lambda: world.engine.open == 0)
    world.engine.fault = ""
    assert world.post(model=model).status_code == 200


@pytest.mark.parametrize("fault", ["503", "context", "404"])
def test_full_queues_and_bad_requests_do_not_open_the_breaker(world: World, fault: str) -> None:  # noqa: F811
    model = world.one()
    for _ in range(8):
        assert world.post(f"fault:{fault}", model=model).status_code >= 400
    assert world.post(model=model).status_code == 200


def test_retry_after_is_kept_to(world: World) -> None:  # noqa: F811
    """An engine that said when to come again is not asked before that."""
    model = world.one()
    world.engine.fault = "429-wait"
    first = world.post(model=model, headers={"x-ratchet-feature": "busy"})
    asked = len(world.engine.bodies)
    second = world.post(model=model)
    assert (first.status_code, second.status_code) == (503, 503)
    assert second.headers["retry-after"] == "1" and len(world.engine.bodies) == asked
