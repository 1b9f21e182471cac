"""Clients that leave, dawdle or never finish, against the whole gateway; docs/faults.md."""

from __future__ import annotations

import time
from typing import Any

import pytest

from serving.gateway.http_protocol import Protocol
from tests.serving.conftest import until
from tests.serving.faults import (  # noqa: F401
    World,
    chat,
    request,
    status,
    until_closed,
    whole_world,
    world,
)


@pytest.mark.parametrize(
    "fault, stream, kind",
    [
        ("hang", False, "plain"),
        ("hang", True, "plain"),
        ("stall-mid", True, "plain"),
        ("hang", False, "release"),
        ("stall-mid", True, "release"),
    ],
)
def test_a_client_that_leaves_pays_for_what_was_done(
    world: World, fault: str, stream: bool, kind: str  # noqa: F811
) -> None:  # fmt: skip
    """Before the first token, in the middle of a stream, and of an answer in one piece."""
    token, key_id = next(world.keys)
    model = "stable" if kind == "release" else world.patient()
    feature = f"leaves-{fault}-{stream}-{kind}".lower()
    body = chat(model, f"fault:{fault}", stream=stream)
    client = world.send(
        request(body, f"authorization: Bearer {token}", f"x-ratchet-feature: {feature}")
    )
    until(lambda: world.engine.open == 1)
    if fault == "stall-mid":
        come = bytearray()
        until(lambda: come.extend(client.recv(1 << 16)) or b"Fact" in come)
    assert world.account(key_id).live == 1
    client.close()
    left = time.monotonic()
    until(lambda: world.engine.open == 0, 1)  # the engine is told within a second
    assert time.monotonic() - left < 1
    record = world.record(feature)
    assert (record.status, record.error) == (499, "client_disconnected")
    assert record.tokens_estimated and (record.prompt_tokens or 0) > 0
    assert bool(record.completion_tokens) == (fault == "stall-mid")
    account = world.account(key_id)
    assert account.live == 0 and account.held == 0  # the slot and the money are free
    used = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
    assert account.tokens.total == used > 0


def test_a_client_that_leaves_in_the_middle_of_its_body_asks_nothing(world: World) -> None:  # noqa: F811
    asked = len(world.engine.bodies)
    whole = request(chat(world.one()), "x-ratchet-feature: half-a-body")
    world.send(whole[:-20]).close()
    record = world.record("half-a-body")
    assert (record.status, record.error) == (499, "client_disconnected")
    assert len(world.engine.bodies) == asked


def test_the_request_that_is_answered_hears_that_its_client_left(world: World) -> None:  # noqa: F811
    """Of two requests on one connection it is the first whose engine must be told."""
    first = chat(world.patient(), "fault:stall-mid", stream=True)
    client = world.send(request(first) + request(chat(world.one())))
    until(lambda: world.engine.open == 1)
    client.recv(1 << 16)
    client.close()
    until(lambda: world.engine.open == 0, 1)


def test_a_client_that_does_not_read_is_cut_off(world: World) -> None:  # noqa: F811
    """Its buffers are bounded, and its connection goes although it never closes it."""
    token, key_id = next(world.keys)
    answer, world.engine.answer = world.engine.answer, "word " * 60_000
    try:
        body = chat(world.one(), stream=True)
        feature = "x-ratchet-feature: slow-reader"
        data = request(body, f"authorization: Bearer {token}", feature)
        client = world.send(data, receive_buffer=4096)
        record = world.record("slow-reader")
    finally:
        world.engine.answer = answer
    assert record.error == "client_disconnected"
    assert 0 < (record.completion_tokens or 0) < 60_000  # the engine was not read on for nobody
    until(lambda: world.engine.open == 0)
    assert world.account(key_id).live == 0
    until(lambda: not world.running.server.server_state.connections)
    client.close()


@pytest.mark.parametrize(
    "sent, code",
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", 408),
        (b"POST /v1/chat/comp", 408),
        (b"", 0),
        (b"\r\n\r\n", 0),
        (request(b"{}").replace(b"content-length: 2", b"content-length: 9"), 408),
    ],
    ids=["half a head", "half a line", "nothing", "empty lines", "half a body"],
)
def test_what_never_ends_is_ended(world: World, sent: bytes, code: int) -> None:  # noqa: F811
    with world.send(sent) as client:
        began = time.monotonic()
        answer = until_closed(client)
        assert status(answer) == code
        assert code == 0 or b'"code": "request_timeout"' in answer
        assert time.monotonic() - began < 3


def test_a_head_that_drips_has_one_deadline_for_all_of_it(world: World) -> None:  # noqa: F811
    """Slowloris: every byte is life, and the head still has to end."""
    client = world.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
    deadline = time.monotonic() + 5
    client.settimeout(0.02)
    answer = b""
    while not answer:
        assert time.monotonic() < deadline
        client.send(b"a")
        try:
            answer = client.recv(1 << 16)
        except TimeoutError:
            continue
    assert status(answer) == 408
    client.close()


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(world: World) -> None:  # noqa: F811
    data = request(b"").replace(b"content-length: 0", b"content-length: 999999999")
    client = world.send(data)
    answer = client.recv(1 << 16)
    assert status(answer) == 413
    deadline = time.monotonic() + 5
    with pytest.raises(OSError):
        while time.monotonic() < deadline:
            client.sendall(b"x")
            time.sleep(0.01)  # a drip, not a wait for something
    client.close()


def test_an_endless_head_is_refused(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its size: the head's deadline is far away."""
    monkeypatch.setattr(Protocol, "head_seconds", 60.0)
    client = world.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-long: ")

    def refused() -> Any:
        try:
            client.sendall(b"y" * 65536)
        except OSError:
            return True
        return False

    until(refused, 3)
    client.close()
