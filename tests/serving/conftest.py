"""A gateway on a real socket in front of fake engines, all in this process."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from contracts.settings import Settings
from resources import releases
from serving.gateway.app import Gateway, create_app
from serving.gateway.cache.config import Cache
from serving.gateway.config import GatewayConfig, Requests
from serving.gateway.http_protocol import Protocol
from serving.gateway.routing.config import Routing
from tests.serving.factory import build, open_json_live, point
from tests.serving.fake_engine import FakeEngine


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Poll until ``condition()`` is truthy; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def impatient(**more: Any) -> GatewayConfig:
    """Short waits, a breaker that never opens, no cache: tests of a module share one engine."""
    routing = {
        "release_timeouts": {"connect": 2, "first_byte": 3, "stall": 2},
        "retries": {"base_seconds": 0.001},
        "breaker": {"failures": 1_000_000},
    }
    more.setdefault("requests", Requests(write_seconds=4))
    more.setdefault("cache", Cache.model_validate({"exact": {"enabled": False}}))
    return GatewayConfig(routing=Routing.model_validate(routing), **more)


class Running:
    """A gateway in a thread. ``client`` speaks to it."""

    def __init__(self, settings: Settings, **parts: Any) -> None:
        parts.setdefault("config", impatient())
        parts.setdefault("open_live", open_json_live(settings))
        parts.setdefault("health_every", 0.05)
        self.settings = settings
        self.gateway = Gateway(settings, **parts)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(self.gateway),
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=5,
            loop="uvloop",
            http=Protocol,
            ws="none",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([sock],), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def ready(self) -> Running:
        until(lambda: self.client.get("/readyz").status_code == 200)
        return self

    def ask(self, question: str, **more: Any) -> httpx.Response:
        body = {"model": "stable", "messages": [{"role": "user", "content": question}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def events(response: httpx.Response) -> list[Any]:
    """The data of a streamed response; the end marker as text."""
    found = []
    for block in response.text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, FakeEngine]]:
    """One ready gateway and its engine for all tests of a module that change neither."""
    root = tmp_path_factory.mktemp("checkout")
    settings = Settings.from_env({"RATCHET_ROOT": str(root)})
    path = releases.install(build(root), root, settings)
    with FakeEngine() as engine:
        point(settings, path.name, engine.url)
        running = Running(settings)
        try:
            yield running.ready(), engine
        finally:
            running.stop()


@pytest.fixture
def engine(shared: tuple[Running, FakeEngine]) -> FakeEngine:
    """The shared gateway's engine; it has not been asked anything yet."""
    shared[1].bodies.clear()
    shared[1].pause = 0.0
    return shared[1]


@pytest.fixture
def gateway(shared: tuple[Running, FakeEngine], engine: FakeEngine) -> Running:
    """The shared gateway."""
    return shared[0]


@pytest.fixture
def release(settings: Settings) -> str:
    """The id of a release that is installed in the test's own checkout. The shared gateway's
    release has the same content, and so the same id."""
    return releases.install(build(settings.root), settings.root, settings).name


@pytest.fixture
def own_engine() -> Iterator[FakeEngine]:
    """An engine that a test may break."""
    with FakeEngine() as found:
        yield found


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Running]]:
    """Start gateways with other parts; they are stopped at the end."""
    found: list[Running] = []

    def make(**parts: Any) -> Running:
        found.append(Running(parts.pop("settings", settings), **parts))
        return found[-1]

    yield make
    for running in found:
        running.stop()


__all__ = ["GatewayConfig", "Running", "events", "until"]
