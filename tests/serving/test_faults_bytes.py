"""Bytes that are no honest request, against the whole gateway; docs/faults.md."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from typing import Any

import pytest

from tests.serving.conftest import until
from tests.serving.faults import (  # noqa: F401
    PATH,
    Lag,
    World,
    chat,
    request,
    status,
    until_closed,
    whole_world,
    world,
)

#: A turn of the event loop, in seconds of CPU. 50 ms are promised for the slowest thing that a
#: client can send; measured are 12 to 25.
LONGEST_TURN = 0.05
MEBI = 1 << 20

BODY = json.dumps(chat("one-119")).encode()
LENGTH = f"content-length: {len(BODY)}\r\n".encode()
START = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"host: gateway\r\n"
JSON = b"content-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
IN_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

HEADS = {
    "both lengths": START + HOST + JSON + LENGTH + CHUNKED + b"\r\n" + IN_CHUNKS,
    "both lengths, other order": START + HOST + JSON + CHUNKED + LENGTH + b"\r\n" + IN_CHUNKS,
    "two lengths": START + HOST + JSON + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": START + HOST + JSON + b"content-length: 5, 5\r\n\r\n" + BODY,
    "a signed length": START + HOST + JSON + b"content-length: +5\r\n\r\n" + BODY,
    "a huge length": START + HOST + JSON + b"content-length: " + b"9" * 40 + b"\r\n\r\n" + BODY,
    "two codings": START + HOST + JSON + b"transfer-encoding: gzip\r\n" + CHUNKED + b"\r\n",
    "another coding": START + HOST + JSON + b"transfer-encoding: xchunked\r\n\r\n" + IN_CHUNKS,
    "chunks in 1.0": START.replace(b"1.1", b"1.0") + HOST + JSON + CHUNKED + b"\r\n" + IN_CHUNKS,
    "two hosts": START + HOST + b"host: other\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "no host": START + JSON + LENGTH + b"\r\n" + BODY,
    "a host with a path": START + b"host: gateway/v1\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "a host with a user": START + b"host: a@gateway\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "a folded header": START + HOST + b"x-a: b\r\n c\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "space before the colon": START + HOST + b"content-length : 5\r\n" + JSON + b"\r\n" + BODY,
    "a NUL in a header": START + HOST + b"x-a: b\0c\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "bare line feeds": (START + HOST + JSON + LENGTH).replace(b"\r\n", b"\n") + b"\n" + BODY,
    "a whole address": START.replace(b"/v1", b"http://other/v1") + HOST + LENGTH + b"\r\n" + BODY,
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2 in 1.1's clothes": START.replace(b"1.1", b"2.0") + HOST + LENGTH + b"\r\n" + BODY,
    "a tunnel": b"CONNECT other:443 HTTP/1.1\r\nhost: other\r\n\r\n",
    "a tunnel to a path": b"CONNECT /v1/models HTTP/1.1\r\nhost: other\r\n\r\n",
    "an offer of a coding": START + HOST + UPGRADE + b"transfer-encoding: gzip\r\n\r\n",
    "a path that is no ASCII": START.replace(b"/v1", "/v\u0661".encode()) + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("name", HEADS)
def test_what_two_servers_could_read_differently_is_refused(world: World, name: str) -> None:  # noqa: F811
    """400 in the envelope, the connection closed, and what follows on it read by nobody."""
    smuggled = request(chat("one-119"))
    code, answer = world.exchange(HEADS[name] + smuggled)
    assert code == 400 and b'"code": "invalid_request"' in answer
    assert answer.count(b"HTTP/1.1 ") == 1 and b"connection: close" in answer
    assert world.engine.bodies == []


OFFERS = {
    "with a length": UPGRADE + LENGTH + b"\r\n" + BODY,
    "in chunks": UPGRADE + CHUNKED + b"\r\n" + IN_CHUNKS,
    "of sockets": UPGRADE.replace(b"h2c", b"websocket") + LENGTH + b"\r\n" + BODY,
}


@pytest.mark.parametrize("name", OFFERS)
@pytest.mark.parametrize("at", ["once", "the head alone", "byte by byte"])
def test_an_offer_of_another_protocol_is_ignored(world: World, name: str, at: str) -> None:  # noqa: F811
    """The request is answered as what it is, and so is the one behind it."""
    data = START + HOST + JSON + OFFERS[name]
    last = b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n"
    head = data.index(b"\r\n\r\n") + 4
    size = {"once": len(data), "the head alone": head, "byte by byte": 1}[at]
    with world.send(data[:size]) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(size, len(data), size):
            client.sendall(data[start : start + size])
        client.sendall(last)
        answer = until_closed(client)
    assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.count(b"HTTP/1.1 ") == 2
    assert [body["messages"] for body in world.engine.bodies] == [chat("")["messages"]]


def test_a_body_behind_an_offer_is_no_request(world: World) -> None:  # noqa: F811
    """However it arrives: a proxy before us has let it through as a body."""
    inside = request(chat("one-119"))
    head = START + HOST + JSON + UPGRADE + b"content-length: %d\r\n\r\n" % len(inside)
    with world.send(head) as client:
        until(lambda: world.running.server.server_state.connections)
        client.sendall(inside + b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = until_closed(client)
    assert status(answer) == 400 and b'"code": "invalid_json"' in answer
    assert answer.count(b"HTTP/1.1 ") == 2 and world.engine.bodies == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1%2fchat%2fcompletions", "/v1/chat%2Fcompletions", "/v1/%63hat/completions",
        "/v1/../v1/chat/completions", "//v1/chat/completions", "/v1/chat/completions/",
        "/v1/chat/completions/../../metrics", "/v1/chat/completions;x=1", "/v1/chat/completions%00",
        "/V1/chat/completions", "/v1/load_lora_adapter", "/pause",
    ],
)  # fmt: skip
def test_a_path_is_what_was_sent(world: World, path: str) -> None:  # noqa: F811
    """Coded slashes, dots and doubled slashes lead nowhere: to no model and no engine."""
    code, answer = world.exchange(request(chat("one-119"), "connection: close", path=path))
    assert code == 404 and b'"code": "not_found"' in answer, answer[:300]
    assert world.engine.bodies == []


def test_a_bomb_is_not_unpacked_and_other_types_are_not_read(world: World) -> None:  # noqa: F811
    client = world.running.client
    bomb = gzip.compress(b"[" * (64 << 20), 1)
    kind = {"content-type": "application/json"}
    for headers in (
        {**kind, "content-encoding": "gzip"},
        {**kind, "content-encoding": "br"},
        {"content-type": "application/xml"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/x-www-form-urlencoded"},
    ):
        response = client.post(PATH, content=bomb, headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
    assert client.post(PATH, content=BODY, headers=kind).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_giant_body_is_refused_before_it_is_here(world: World, declared: bool) -> None:  # noqa: F811
    """By its declared length at once; without one as soon as it is over, and memory stays small."""
    limit = world.running.gateway.services.now.config.requests.body_bytes
    if declared:
        data = START + HOST + JSON + b"content-length: 99999999999\r\n\r\n"
        sent = 0
    else:
        data = START + HOST + JSON + CHUNKED + b"\r\n"
        sent = limit + 1
    with world.send(data) as client:
        for _ in range(0, sent, 65536):
            client.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert status(until_closed(client)) == 413


def _many(item: bytes, count: int, field: bytes = b"messages") -> bytes:
    return b'{"model": "one-119", "%s": [' % field + item + (b"," + item) * (count - 1) + b"]}"


def _filled(item: bytes, field: bytes = b"input") -> bytes:
    return _many(item, (MEBI - 100) // (len(item) + 1), field)


def _keys(count: int) -> bytes:
    return b"{%s}" % b",".join(b'"k%d":0' % n for n in (*range(count), count - 1))


#: What costs the most to read: path, body. All of them are refused.
HOSTILE: dict[str, tuple[str, bytes]] = {
    "a million messages": ("chat/completions", _many(b"{}", 349_000)),
    "as many messages as are read": ("chat/completions", _many(b"{}", 29_900)),
    "deep": ("chat/completions", b'{"a":' * 200_000),
    "deep lists": ("chat/completions", b'{"model":' + b"[" * 1_000_000),
    "numbers": ("embeddings", _filled(b"1")),
    "as many numbers as are read": ("embeddings", _many(b"-1", 199_000, b"input")),
    "texts": ("embeddings", _filled(b'""')),
    "lists": ("embeddings", _filled(b"[]")),
    "lists of a number": ("embeddings", _many(b"[1]", 29_900, b"input")),
    "a key twice, at the end": ("chat/completions", _keys(49_000)),
    "NUL, at the end": ("embeddings", _filled(b'"aaaaaaaaaaaaaa"')[:-2] + b',"\\u0000"]}'),
    "half a character": ("embeddings", _filled(b'"aaaaaaaaaaaaaa"')[:-2] + b',"\\udfff"]}'),
    "digits": ("chat/completions", b'{"seed": ' + b"9" * (MEBI - 100) + b"}"),
    "an exponent": ("chat/completions", b'{"model": "one-119", "temperature": 1e999999999}'),
    "a quote without an end": ("chat/completions", b'{"model": "' + b'\\"' * (MEBI // 2 - 100)),
    "backslashes": ("embeddings", _filled(b'"\\\\"')),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_400_and_holds_nobody_up(world: World, name: str) -> None:  # noqa: F811
    path, body = HOSTILE[name]
    kind = {"content-type": "application/json"}
    with Lag(world.running) as lag:
        response = world.running.client.post(f"/v1/{path}", content=body, headers=kind)
    assert response.status_code == 400, response.text[:300]
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_request")
    assert len(response.content) < 2_000  # the body is not given back
    assert lag.worst < LONGEST_TURN
    assert world.engine.bodies == []


@pytest.mark.parametrize("guarded", [False, True])
def test_a_megabyte_that_is_honest_holds_nobody_up(world: World, guarded: bool) -> None:  # noqa: F811
    """It is answered, and a small stream beside it goes on."""
    key = world.guarded if guarded else ""
    small: list[Any] = []

    def beside() -> None:
        small.append(world.post(model=world.one(), stream=True))

    world.engine.pause = 0.005
    thread = threading.Thread(target=beside)
    with Lag(world.running) as lag:
        thread.start()
        until(lambda: world.engine.open >= 1)
        big = world.post("word, " * 170_000, key=key, model=world.one())
    thread.join()
    assert (big.status_code, small[0].status_code) == (200, 200)
    assert lag.worst < LONGEST_TURN


ODD: list[tuple[str, Any]] = [
    ("messages", [{"role": [], "content": "x"}]),
    ("messages", [{"role": {}, "content": "x"}]),
    ("messages", {"0": {"role": "user"}}),
    ("messages", [[]]),
    ("messages", [{"role": "user", "content": [{"type": []}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": {}}]}]),
    ("messages", [None]),
    ("model", ["one-119"]),
    ("model", {}),
    ("stop", {"a": 1}),
    ("stream_options", 7),
    ("logprobs", "yes"),
    ("temperature", 1 << 100),
    ("seed", -(1 << 100)),
    ("max_tokens", 1.0),
    ("max_tokens", True),
    ("tools", [{"type": "function", "function": {"name": []}}]),
    ("tool_choice", []),
    ("response_format", []),
    ("logit_bias", []),
    ("user", []),
]


@pytest.mark.parametrize("model", ["one-119", "stable"])
def test_values_of_the_wrong_kind_are_never_a_bug(world: World, model: str) -> None:  # noqa: F811
    for name, value in ODD:
        body = {**chat(model), name: value}
        response = world.running.client.post(PATH, json=body)
        # What a release does not use is dropped unread.
        allowed = (400, 200) if model == "stable" and name in ("user", "seed") else (400,)
        assert response.status_code in allowed, (name, value, response.text)
