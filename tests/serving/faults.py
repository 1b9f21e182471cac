"""What the tests of docs/faults.md share: one whole gateway on a socket, and what it must be like
again after each of them.

A ``World`` has many logical models of the same two engines, so that no test meets the circuit
breaker that another one has opened, and many keys, so that accounts begin empty.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracts.records import RequestRecord
from contracts.settings import Settings
from resources import releases
from resources import requests as request_log
from resources.keys import KeyStore
from serving.gateway.config import GatewayConfig
from serving.gateway.http_protocol import Protocol
from serving.gateway.limits.account import Account
from serving.gateway.limits.memory import MemoryLimiter
from tests.serving.conftest import Running, until
from tests.serving.factory import build, open_json_live, point
from tests.serving.fake_engine import FakeEngine

#: What a test waits for when something hangs. A module with many clients at once says SECONDS.
WAIT = 0.2
LIMITS = {"tokens_per_minute": 100_000, "requests_per_minute": 1_000, "concurrent": 2}
#: What 100 requests at once must not exceed.
TIGHT: dict[str, dict[str, Any]] = {
    "requests": {"requests_per_minute": 20},
    "tokens": {"tokens_per_minute": 2_000},
    "concurrent": {"concurrent": 5},
    "session": {"session_tokens": 1_000},
    "spend": {"spend_day": 1.0},
}
PATH = "/v1/chat/completions"
GUARDED = {"output": {"pii": {"action": "redact"}}}


def config(urls: list[str], seconds: float = WAIT, **more: Any) -> GatewayConfig:
    """Models ``one-<n>`` at the first engine, ``patient-<n>`` at the same with deadlines that are
    not met, and ``two-<n>`` at both engines, the first one preferred."""
    timeouts = dict.fromkeys(("first_byte", "stall", "unstreamed"), seconds) | {"connect": 0.1}
    providers: dict[str, Any] = {
        f"p{n}": {"url": url, "dialect": "vllm", "timeouts": timeouts} for n, url in enumerate(urls)
    }
    providers["patient"] = {"url": urls[0], "dialect": "vllm"}
    models = []
    for n in range(120):
        slow = {"provider": "patient", "model": f"nano-patient-{n}", "price": "nano"}
        models.append({"name": f"patient-{n}", "candidates": [slow]})
        one = {"provider": "p0", "model": f"nano-{n}", "price": "nano", "weight": 1e12}
        models.append({"name": f"one-{n}", "candidates": [one]})
        if len(urls) > 1:
            other = {"provider": "p1", "model": f"nano-{n}", "price": "nano"}
            first = {**one, "model": f"nano-two-{n}"}
            models.append({"name": f"two-{n}", "candidates": [first, other]})
    value = {
        "routing": {
            "providers": providers,
            "models": models,
            "release_timeouts": {"connect": 0.3, "first_byte": seconds, "stall": seconds},
            "retries": {"burst": 1000, "base_seconds": 0.001, "max_wait_seconds": 0.5},
            "breaker": {"open_seconds": 0.1},
        },
        "prices": {"nano": {"input": 1.0, "output": 2.0}},
        "requests": {"write_seconds": seconds, "body_seconds": seconds},
        "guards": {"policies": {"guarded": GUARDED}},
        "cache": {"exact": {"enabled": False}},  # the same question is asked over and over
        **more,
    }
    return GatewayConfig.model_validate(value)


@dataclass
class World:
    """A gateway, its engines and keys. ``one()``, ``patient()`` and ``two()`` name models that
    were not used before."""

    running: Running
    engine: FakeEngine
    other: FakeEngine
    keys: Iterator[tuple[str, str]]  # token, id
    guarded: str  # a token whose policy changes answers
    tight: dict[str, tuple[str, str]]  # by what is limited: token, id
    wrong: dict[str, str]  # tokens that let nobody in, by why
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def settings(self) -> Settings:
        return self.running.settings

    def one(self) -> str:
        return f"one-{next(self.numbers)}"

    def patient(self) -> str:
        return f"patient-{next(self.numbers)}"

    def two(self) -> str:
        return f"two-{next(self.numbers)}"

    def post(self, text: str = "hello", key: str = "", **body: Any) -> httpx.Response:
        """A chat request; ``path`` and ``headers`` may be given."""
        headers = {**({"authorization": f"Bearer {key}"} if key else {}), **body.pop("headers", {})}
        path = body.pop("path", PATH)
        if path == PATH:
            body.setdefault("messages", [{"role": "user", "content": text}])
        body.setdefault("model", "one-119")
        return self.running.client.post(path, json=body, headers=headers)

    def send(self, data: bytes, receive_buffer: int = 0) -> socket.socket:
        """Bytes on a connection of their own."""
        host, port = self.running.url.removeprefix("http://").split(":")
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect((host, int(port)))
        client.sendall(data)
        return client

    def exchange(self, data: bytes) -> tuple[int, bytes]:
        """The status and all that comes until the gateway closes the connection."""
        with self.send(data) as client:
            answer = until_closed(client)
        return status(answer), answer

    def record(self, feature: str) -> RequestRecord:
        """The request log's only row of a feature."""

        def found() -> list[Any]:
            table = request_log.read_day(self.settings, datetime.now(UTC).date())
            return [row for row in table.to_pylist() if row["feature"] == feature]

        (row,) = until(found)
        return RequestRecord.model_validate(row)

    def record_of(self, response: httpx.Response) -> RequestRecord:
        name = response.headers["x-request-id"]
        found: RequestRecord = until(lambda: request_log.find(self.settings, name))
        return found

    def account(self, key_id: str) -> Account:
        """What a key has used and holds."""
        limiter = self.running.gateway.services.limiter
        assert isinstance(limiter, MemoryLimiter)
        return limiter._accounts[f"{{acme}}:k:{key_id}"]

    def outcomes(self, outcome: str, provider: str = "p0") -> float:
        return self.running.metric(
            "ratchet_gateway_upstream_attempts_total", provider=provider, outcome=outcome
        )


def until_closed(client: socket.socket) -> bytes:
    found = b""
    try:
        while data := client.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def status(answer: bytes) -> int:
    """0 when the connection was closed without a word."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def request(body: Any, *headers: str, path: str = PATH, host: str = "gateway") -> bytes:
    """A whole request; ``headers`` as lines."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
    lines += [f"content-length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def begin(
    root: Path, engine: FakeEngine, other: FakeEngine, environ: dict[str, str] | None = None,
    seconds: float = WAIT, **more: Any,
) -> World:  # fmt: skip
    """A world with a release, plain models and keys. ``more`` are blocks of its configuration."""
    settings = Settings.from_env({"RATCHET_ROOT": str(root), **(environ or {})})
    point(settings, releases.install(build(root), root, settings).name, engine.url)
    store = KeyStore.open(settings)
    issued = [store.create("acme", f"app-{n}", limits=LIMITS) for n in range(30)]
    tight = {name: store.create("acme", name, limits=limits) for name, limits in TIGHT.items()}
    revoked = store.create("acme", "revoked")
    store.revoke(revoked.key.id)
    soon = store.create("acme", "expired", expires=time.time() + 0.05)
    right = issued[0].token
    wrong = {
        "revoked": revoked.token,
        "expired": soon.token,
        "wrong": right[:-4] + ("aaaa" if right[-4:] != "aaaa" else "bbbb"),
        "unknown": "rk_ffffffffffff." + right.partition(".")[2],
        "malformed": "rk_x",
        "long": right + "x" * 1000,
        "injected": "rk_' OR 1=1 --." + "x" * 43,
    }
    guarded = store.create("acme", "guarded", guard="guarded").token
    store.close()
    running = Running(
        settings,
        config=config([engine.url, other.url], seconds, **more),
        open_live=open_json_live(settings),
        health_every=60,  # its probes would come and go among the counted connections
    )
    world = World(
        running,
        engine,
        other,
        ((one.token, one.key.id) for one in issued),
        guarded,
        {name: (one.token, one.key.id) for name, one in tight.items()},
        wrong,
    )
    until(lambda: world.post(model="stable").status_code == 200)
    until(lambda: world.post(key=right, stream=True).status_code == 200)
    for path, body in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        world.post(path=path, **{body: "x"})
    next(world.keys)
    return world


@pytest.fixture(scope="module")
def whole_world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """One gateway for a module, with short waits."""
    seconds = getattr(request.module, "SECONDS", WAIT)
    with pytest.MonkeyPatch.context() as patch, FakeEngine() as engine, FakeEngine() as other:
        patch.setattr(Protocol, "head_seconds", seconds)
        patch.setattr(Protocol, "linger_seconds", 0.1)
        world = begin(tmp_path_factory.mktemp("world"), engine, other, seconds=seconds)
        gc.collect()
        gc.freeze()  # as serving/gateway/server.py does: or a full collection is a turn of 100 ms
        yield world
        gc.unfreeze()
        world.running.stop()


@pytest.fixture
def world(whole_world: World, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    """The module's gateway; at the end of the test everything it held must be free again, and
    nothing may have gone wrong unseen."""
    found = whole_world
    for engine in (found.engine, found.other):
        engine.fault, engine.pause = "", 0.0
        engine.bodies.clear()
        engine.headers.clear()
    before = Held.by(found)
    yield found
    for engine in (found.engine, found.other):
        engine.fault, engine.pause = "", 0.0
    found.running.client.close()
    # Reading the certificates takes 20 ms, and nobody is asked by TLS.
    found.running.client = httpx.Client(base_url=found.running.url, timeout=20, verify=False)
    until(lambda: Held.by(found).within(before), 5)
    unseen = [r for r in caplog.records if r.name in ("asyncio", "ratchet.gateway.handler")]
    assert unseen == []


@dataclass
class Held:
    """What a gateway holds between requests."""

    requests: float
    leases: float
    tasks: int
    descriptors: int
    upstream: int  # connections in use
    connections: int

    @classmethod
    def by(cls, world: World) -> Held:
        running = world.running
        services = running.gateway.services
        http = running.gateway.upstream.http

        async def on_the_loop() -> tuple[int, int, int]:
            return len(asyncio.all_tasks()), http.idle, http.used

        tasks, idle, used = on_loop(running, on_the_loop())
        return cls(
            services.in_flight,
            running.metric("ratchet_gateway_leases"),
            tasks,
            # Both ends of a pooled connection are in this process; it may close at any time.
            len(list(Path("/proc/self/fd").iterdir())) - 2 * idle,
            used + world.engine.open + world.other.open,
            len(running.server.server_state.connections),
        )

    def within(self, before: Held) -> bool:
        return (
            (self.requests, self.leases, self.upstream, self.connections) == (0, 0, 0, 0)
            and self.tasks <= before.tasks
            and self.descriptors <= before.descriptors
        )


def on_loop(running: Running, work: Any) -> Any:
    """Run a coroutine on the gateway's loop."""
    loop = running.server.servers[0].get_loop()
    return asyncio.run_coroutine_threadsafe(work, loop).result(10)


class Lag:
    """The longest turn of the gateway's event loop, in seconds of its own thread's CPU time: other
    processes of a busy machine do not count. Use as ``with``."""

    def __init__(self, running: Running) -> None:
        self._running, self._going, self.worst = running, True, 0.0

    def __enter__(self) -> Lag:
        loop = self._running.server.servers[0].get_loop()
        self._task = asyncio.run_coroutine_threadsafe(self._watch(), loop)
        return self

    def __exit__(self, *exc: object) -> None:
        self._going = False
        self._task.result(10)

    async def _watch(self) -> None:
        last = time.thread_time()
        while self._going:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            self.worst, last = max(self.worst, now - last), now


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(n)`` in as many threads, begun together."""
    found: list[Any] = [None] * count
    gate = threading.Barrier(count)

    def one(n: int) -> None:
        gate.wait()
        try:
            found[n] = work(n)
        except Exception as error:
            found[n] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (failed := [one for one in found if isinstance(one, Exception)]), failed
    return found


__all__ = ["whole_world", "world"]
