"""Limits over HTTP against real worker processes, which share nothing but a store: a hundred
requests at once, and stores that are killed in the middle of load; docs/faults.md.

test_faults_stores.py does the same to one gateway in this process and looks inside of it.
"""

from __future__ import annotations

import collections
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
import yaml

from contracts.settings import Settings
from resources.keys import KeyStore
from tests.servers import Server, postgres_server, redis_server  # noqa: F401
from tests.serving.conftest import until
from tests.serving.fake_engine import FakeEngine
from tests.serving.faults import at_once
from tests.serving.test_gateway_process import Process

pytestmark = pytest.mark.slow
PARALLEL = 100
#: What one request uses, as the engine counts: 3 tokens of prompt, 100 of answer.
USED, PRICE = 103, 3 * 1_000 + 100 * 2_000  # in billionths
#: By what is limited; the most requests that may be answered at once or in all.
TIGHT: dict[str, tuple[dict[str, Any], int]] = {
    "requests": ({"requests_per_minute": 20}, 20),
    "tokens": ({"tokens_per_minute": 2_000}, 2_000 // USED),
    "session": ({"session_tokens": 1_000}, 1_000 // USED),
    "spend": ({"spend_day": 0.002}, 2_000_000 // PRICE),
}


class Cluster:
    """Two worker processes; every second request goes to the other one."""

    def __init__(
        self, settings: Settings, engine: FakeEngine, environ: dict[str, str], **blocks: Any
    ) -> None:
        engine.tokens = 100
        provider = {"url": engine.url, "dialect": "vllm"}
        model = {"name": "a", "candidates": [{"provider": "it", "model": "nano", "price": "nano"}]}
        value = {
            "routing": {"providers": {"it": provider}, "models": [model]},
            "prices": {"nano": {"input": 1.0, "output": 2.0}},
            "cache": {"exact": {"enabled": False}},
            **blocks,
        }
        (settings.root / "gateway.yaml").write_text(yaml.safe_dump(value))
        store = KeyStore.open(Settings.from_env({"RATCHET_ROOT": str(settings.root), **environ}))
        self.ids, self.tokens = {}, {}
        for name, (limits, _) in {**TIGHT, "load": ({"spend_day": 1.0}, 0)}.items():
            issued = store.create("acme", name, limits=limits)
            self.ids[name], self.tokens[name] = issued.key.id, issued.token
        store.close()
        self.process = Process(settings, "--workers", "2", environ=environ).ready()
        self.urls: list[str] = [worker["url"] for worker in self.process.told["workers"]]
        for url in self.urls:
            until(lambda url=url: httpx.get(f"{url}/readyz").status_code == 200)

    def post(self, n: int, key: str) -> httpx.Response:
        body = {"model": "a", "max_tokens": 100, "user": "one",
                "messages": [{"role": "user", "content": "hello"}]}  # fmt: skip
        return httpx.post(
            f"{self.urls[n % 2]}/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {self.tokens[key]}"},
            timeout=20,
            verify=False,  # reading the certificates takes 20 ms
        )

    def metric(self, name: str) -> float:
        """The sum over the workers."""
        found = 0.0
        for url in self.urls:
            text = httpx.get(f"{url}/metrics", verify=False).text
            found += sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)))
        return found


@pytest.fixture
def cluster(settings: Settings, own_engine: FakeEngine) -> Iterator[Callable[..., Cluster]]:
    found: list[Cluster] = []

    def start(environ: dict[str, str], **blocks: Any) -> Cluster:
        found.append(Cluster(settings, own_engine, environ, **blocks))
        return found[-1]

    yield start
    for one in found:
        one.process.end()


@pytest.mark.parametrize("backend", ["sqlite", "redis"])
def test_a_hundred_at_once_at_two_processes(
    cluster: Callable[..., Cluster], backend: str, own_engine: FakeEngine,
    redis_server: Server,  # noqa: F811
) -> None:  # fmt: skip
    """No limit is exceeded, and none is much lower than it says."""
    environ = {"REDIS_URL": redis_server.url} if backend == "redis" else {}
    found = cluster(environ, limits={"backend": backend, "timeout_ms": 5_000})
    for name, (_, most) in TIGHT.items():
        own_engine.bodies.clear()
        statuses = collections.Counter(
            at_once(PARALLEL, lambda n, name=name: found.post(n, name).status_code)
        )
        assert set(statuses) == {200, 429}, name
        # What a request may use at most is what it does use here; its prompt is estimated higher.
        assert most * 0.8 <= statuses[200] <= most, (name, statuses)
        assert len(own_engine.bodies) == statuses[200]
    assert found.metric("ratchet_gateway_settlements_dropped_total") == 0


class Load:
    """Requests one after another in four threads, at both processes, until the end of the
    ``with``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._going = cluster, True
        self.answered: collections.Counter[int] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()

    def _work(self, n: int) -> None:
        while self._going:
            began = time.monotonic()
            response = self._cluster.post(n, "load")
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.answered[response.status_code] += 1
            if response.status_code != 200:
                self.codes[response.json()["error"]["code"]] += 1

    def more(self, count: int, status: int = 200) -> None:
        before = self.answered[status]
        until(lambda: self.answered[status] >= before + count, 30)


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_redis_dies_and_comes_back_under_load_of_two_processes(
    cluster: Callable[..., Cluster],
    redis_server: Server,  # noqa: F811
    policy: str,
) -> None:
    """No 500 and no hang; afterwards the books hold every answer of both processes once."""
    found = cluster(
        {"REDIS_URL": redis_server.url},
        limits={"backend": "redis", "timeout_ms": 500, "on_outage": policy},
    )
    with Load(found) as load:
        load.more(30)
        redis_server.kill()
        load.more(60, 200 if policy == "allow" else 503)
        redis_server.start()
        load.more(60)
        if policy == "deny":
            until(lambda: not _refused_of(load, 20), 30)
    assert set(load.answered) == ({200} if policy == "allow" else {200, 503})
    assert set(load.codes) == (set() if policy == "allow" else {"limits_unavailable"})
    assert load.slowest < 5
    until(lambda: found.metric("ratchet_gateway_settlements_waiting") == 0)
    assert found.metric("ratchet_gateway_settlements_dropped_total") == 0
    assert found.metric("ratchet_gateway_leases") == 0

    def spent() -> int:
        with redis.Redis.from_url(redis_server.url) as client:
            account = f"ratchet:limits:{{acme}}:k:{found.ids['load']}:m"
            return int(client.hget(account, "d") or 0)  # type: ignore[arg-type]

    until(lambda: spent() == load.answered[200] * PRICE)


def _refused_of(load: Load, count: int) -> int:
    """How many of the next requests are refused."""
    before = load.answered[503]
    load.more(count)
    return load.answered[503] - before


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_postgres_dies_and_comes_back_under_load_of_two_processes(
    cluster: Callable[..., Cluster],
    postgres_server: Server,  # noqa: F811
    policy: str,
) -> None:
    """Keys read last count for as long as is configured, then 503; both processes come back by
    themselves and hear of a revocation."""
    environ = {"POSTGRES_URL": postgres_server.url, "RATCHET_KEYS_SECRET": "x" * 64}
    auth = {"required": True, "outage_seconds": 600 if policy == "allow" else 0}
    found = cluster(environ, auth=auth, limits={"backend": "memory"})
    with Load(found) as load:
        load.more(30)
        postgres_server.kill()
        if policy == "allow":
            until(lambda: found.metric("ratchet_gateway_keys_refresh_failures_total") >= 2, 30)
            load.more(60)
        else:
            load.more(20, 503)
        postgres_server.start()
        load.more(60)
        root = {"RATCHET_ROOT": str(found.process.file.parent)}
        store = KeyStore.open(Settings.from_env({**root, **environ}))
        store.revoke(found.ids["load"])
        store.close()
        load.more(10, 401)
        until(lambda: all(found.post(n, "load").status_code == 401 for n in range(4)), 30)
    assert set(load.answered) == ({200, 401} if policy == "allow" else {200, 401, 503})
    assert set(load.codes) <= {"invalid_api_key", "keys_unavailable"}
    assert load.slowest < 5
