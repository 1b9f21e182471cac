"""Limits under a hundred requests at once, and stores that die in the middle of load, through the
whole gateway; docs/faults.md."""

from __future__ import annotations

import collections
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from resources.keys import KeyStore
from tests.servers import Server, postgres_server, redis_server  # noqa: F401
from tests.serving.conftest import until
from tests.serving.fake_engine import FakeEngine
from tests.serving.faults import (  # noqa: F401
    TIGHT,
    World,
    at_once,
    begin,
    chat,
    request,
    whole_world,
    world,
)

PARALLEL = 100
SECONDS = 10.0


def hundred(world: World, name: str, **more: Any) -> collections.Counter[int]:  # noqa: F811
    """A hundred requests of a tight key at once: how many got which status."""
    token, _ = world.tight[name]
    model = more.pop("model", None) or world.one()
    found = at_once(PARALLEL, lambda n: world.post(key=token, model=model, max_tokens=100, **more))
    assert {response.status_code for response in found} <= {200, 429}
    return collections.Counter(response.status_code for response in found)


@pytest.fixture(scope="module")
def redis_world(
    tmp_path_factory: pytest.TempPathFactory, redis_server: Server  # noqa: F811
) -> Iterator[World]:  # fmt: skip
    with FakeEngine() as engine, FakeEngine() as other:
        limits = {"backend": "redis", "timeout_ms": 5_000}
        root = tmp_path_factory.mktemp("redis")
        found = begin(root, engine, other, {"REDIS_URL": redis_server.url}, SECONDS, limits=limits)
        yield found
        found.running.stop()


@pytest.fixture(params=["memory", "redis"])
def limited(request: pytest.FixtureRequest) -> World:
    """The gateway with either store of its limits."""
    name = {"memory": "world", "redis": "redis_world"}[request.param]
    found: World = request.getfixturevalue(name)
    return found


def test_a_hundred_at_once_never_exceed_requests(limited: World) -> None:
    assert hundred(limited, "requests")[200] == TIGHT["requests"]["requests_per_minute"]


@pytest.mark.parametrize("kind", ["plain", "release"])
def test_a_hundred_at_once_never_exceed_tokens(limited: World, kind: str) -> None:
    """What is reserved together never is more than the limit, so neither is what is used."""
    limited.engine.pause = 0.002
    if kind == "release":
        limit, more = TIGHT["tokens"]["tokens_per_minute"], {"model": "stable"}
        answered = hundred(limited, "tokens", stream=True, **more)
    else:
        limit = TIGHT["session"]["session_tokens"]
        answered = hundred(limited, "session", stream=True, user="one")
    limited.engine.pause = 0.0
    used = answered[200] * (20 + len(limited.engine.answer.split()))
    assert answered[200] and answered[429] and used <= limit


def test_a_hundred_at_once_never_exceed_the_slots(limited: World) -> None:
    """Seen from the engine: it never works on more than that."""
    most, going = 0, True

    def watch() -> None:
        nonlocal most
        while going:
            most = max(most, limited.engine.open)
            time.sleep(0.0005)  # a sampling interval

    watcher = threading.Thread(target=watch)
    watcher.start()
    limited.engine.pause = 0.02
    answered = hundred(limited, "concurrent", stream=True)
    going = False
    watcher.join()
    limited.engine.pause = 0.0
    assert answered[200] >= 1 and 1 <= most <= TIGHT["concurrent"]["concurrent"]
    token, _ = limited.tight["concurrent"]
    until(lambda: limited.post(key=token).status_code == 200)  # and every slot comes back


class Load:
    """Requests one after another in four threads, until the end of the ``with``."""

    def __init__(self, world: World, token: str) -> None:  # noqa: F811
        self._world, self._token, self._going = world, token, True
        self.model = world.one()
        self.statuses: collections.Counter[int] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._work) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while self._going:
            began = time.monotonic()
            response = self._world.post(key=self._token, model=self.model)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.statuses[response.status_code] += 1
            if response.status_code != 200:
                self.codes[response.json()["error"]["code"]] += 1

    def more(self, count: int = 30, status: int = 200) -> None:
        """Wait for that many further answers."""
        before = self.statuses[status]
        until(lambda: self.statuses[status] >= before + count, 30)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_redis_is_killed_and_started_again_in_the_middle_of_load(
    tmp_path_factory: pytest.TempPathFactory, redis_server: Server, policy: str  # noqa: F811
) -> None:  # fmt: skip
    """No 500, no hang; and every answer is in the books once, those of the outage included."""
    with FakeEngine() as engine, FakeEngine() as other:
        limits = {"backend": "redis", "timeout_ms": 500, "on_outage": policy}
        root = tmp_path_factory.mktemp(policy)
        found = begin(root, engine, other, {"REDIS_URL": redis_server.url}, SECONDS, limits=limits)
        token, key_id = found.tight["spend"]
        try:
            with Load(found, token) as load:
                load.more()
                redis_server.kill()
                if policy == "allow":
                    load.more(60)
                else:
                    load.more(60, 503)
                redis_server.start()
                until(lambda: found.running.gateway.services.limiter._up)  # type: ignore[attr-defined]
                load.more(60)
            expected = {200} if policy == "allow" else {200, 503}
            assert set(load.statuses) == expected
            assert set(load.codes) == (set() if policy == "allow" else {"limits_unavailable"})
            assert load.slowest < 5
            until(lambda: not found.running.metric("ratchet_gateway_settlements_waiting"))
            assert found.running.metric("ratchet_gateway_settlements_dropped_total") == 0
            # One price for all: a prompt of 3 tokens and an answer of 1, as the engine counts.
            price = 3 * 1_000 + 1 * 2_000
            with redis.Redis.from_url(redis_server.url) as client:
                spent = client.hget(f"ratchet:limits:{{acme}}:k:{key_id}:m", "d")
            assert int(spent or 0) == load.statuses[200] * price  # type: ignore[arg-type]
            assert found.running.metric("ratchet_gateway_leases") == 0
        finally:
            found.running.stop()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_postgres_is_killed_and_started_again_in_the_middle_of_load(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Server, policy: str  # noqa: F811
) -> None:  # fmt: skip
    """The keys read last count for as long as is configured; then 503, and back by itself."""
    with FakeEngine() as engine, FakeEngine() as other:
        environ = {"POSTGRES_URL": postgres_server.url, "RATCHET_KEYS_SECRET": "x" * 64}
        auth = {"required": False, "outage_seconds": 600 if policy == "allow" else 0}
        found = begin(tmp_path_factory.mktemp(policy), engine, other, environ, SECONDS, auth=auth)
        token, key_id = found.tight["spend"]
        try:
            with Load(found, token) as load:
                load.more()
                postgres_server.kill()
                if policy == "allow":
                    age = "ratchet_gateway_keys_refresh_failures_total"
                    until(lambda: found.running.metric(age) >= 1)
                    load.more(60)
                else:
                    load.more(10, 503)
                # A wrong key is never let in, whatever the policy.
                assert found.post(key=found.wrong["wrong"]).status_code in (401, 503)
                postgres_server.start()
                load.more(60)
                store = KeyStore.open(found.settings)
                store.revoke(key_id)
                store.close()
                load.more(5, 401)  # what was revoked afterwards is heard of
            assert set(load.statuses) == ({200, 401} if policy == "allow" else {200, 401, 503})
            assert set(load.codes) <= {"invalid_api_key", "keys_unavailable"}
            assert load.slowest < 5
        finally:
            found.running.stop()


@pytest.mark.slow
def test_random_disconnects_leave_nothing_behind(world: World) -> None:  # noqa: F811
    """A short soak: 400 clients that leave at any moment, and after them all is as before; the
    fixture looks at descriptors, tasks, leases and connections."""
    draw = random.Random(7)
    world.engine.pause = 0.002
    faults = ["", "slow", "stall-mid", "reset-mid", "eof", "hang", "500", "split", "error-mid"]
    token, key_id = next(world.keys)
    models = [world.patient() for _ in range(20)]

    def leave(n: int) -> None:
        for _ in range(10):
            body = chat(draw.choice(models), f"fault:{draw.choice(faults)}",
                        stream=draw.random() < 0.7)  # fmt: skip
            data = request(body, f"authorization: Bearer {token}")
            whole = data if draw.random() < 0.8 else data[: draw.randrange(len(data))]
            with world.send(whole) as client:
                client.settimeout(draw.random() * 0.05)
                try:
                    while client.recv(4096):
                        pass
                except OSError:
                    continue

    at_once(40, leave)
    until(lambda: world.account(key_id).live == 0)
    assert world.account(key_id).held == 0
