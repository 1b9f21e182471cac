"""The gateway as processes: workers that die, drains, reloads, and ends of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from contracts.settings import Settings
from tests.serving.conftest import events, until
from tests.serving.fake_engine import FakeEngine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def config(url: str, *models: str, **more: Any) -> str:
    routes = [{"name": n, "candidates": [{"provider": "it", "model": "nano"}]} for n in models]
    return yaml.safe_dump(
        {"routing": {"providers": {"it": {"url": url}}, "models": routes}, **more}
    )


class Process:
    """A started gateway; ``told`` is the line that it printed."""

    def __init__(
        self, settings: Settings, *arguments: str, environ: dict[str, str] | None = None
    ) -> None:
        self.file = settings.root / "gateway.yaml"
        self.errors = (settings.root / "stderr").open("a+")
        own = {"RATCHET_ROOT": str(settings.root), "RATCHET_GATEWAY_CONFIG": str(self.file)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.gateway", "--port", "0", "--metrics-port", "0",
             *arguments],
            stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT,
            env={**os.environ, **own, **(environ or {})},
        )  # fmt: skip

    def ready(self) -> Process:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        self.told = json.loads(line)
        self.client = httpx.Client(base_url=self.told["url"], timeout=20)
        until(lambda: self.client.get("/readyz").status_code == 200)
        return self

    def ask(self, model: str = "a", text: str = "x", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return httpx.post(self.told["url"] + "/v1/chat/completions", json=body, timeout=20)

    def models(self) -> list[str]:
        found: list[str] = self.client.get("/readyz").json()["models"]
        return found

    def log(self) -> str:
        return Path(self.errors.name).read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()


@pytest.fixture
def begin(settings: Settings, own_engine: FakeEngine) -> Iterator[Callable[..., Process]]:
    found: list[Process] = []

    def start(*arguments: str, text: str = "") -> Process:
        file = settings.root / "gateway.yaml"
        file.write_text(text or config(own_engine.url, "a"))
        found.append(Process(settings, *arguments))
        return found[-1]

    yield start
    for process in found:
        process.end()


def test_a_worker_that_dies_is_replaced_and_nobody_is_turned_away(
    begin: Callable[..., Process],
) -> None:
    gateway = begin("--workers", "2").ready()
    first, second = gateway.told["workers"]
    assert first["pid"] != second["pid"]
    assert {gateway.ask().status_code for _ in range(8)} == {200}
    os.kill(first["pid"], signal.SIGKILL)
    # The socket is the supervisor's: new connections wait for the worker that lives.
    assert {gateway.ask().status_code for _ in range(8)} == {200}
    url = first["url"] + "/metrics"  # the same address as before

    def is_back() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url, timeout=1).status_code == 200
        return False

    until(is_back, 20)
    living = psutil.Process(gateway.process.pid).children()
    assert len(living) == 2 and first["pid"] not in {child.pid for child in living}


def test_a_purge_by_command_reaches_every_worker(
    begin: Callable[..., Process], own_engine: FakeEngine, settings: Settings
) -> None:
    """When the command is done, no worker has an answer from before."""
    gateway = begin("--workers", "2").ready()

    def ask() -> str:
        message = gateway.ask(temperature=0).json()["choices"][0]["message"]
        return str(message["content"])

    def both_have_it(answers: int) -> bool:
        with ThreadPoolExecutor(8) as pool:  # one alone would mostly meet the same worker
            list(pool.map(lambda _: ask(), range(8)))
        return len(own_engine.bodies) == answers

    def forget(*what: str) -> None:
        command = [sys.executable, "-m", "pipelines.cli", "cache", "purge", *what]
        environ = {**os.environ, "RATCHET_STATE_DIR": str(settings.state_dir)}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["deleted"] == {"from": [], "answers": 0}

    until(lambda: both_have_it(2))  # each worker has asked the engine once
    forget("--tenant", "somebody-else")
    assert {ask() for _ in range(12)} == {own_engine.answer} and len(own_engine.bodies) == 2
    own_engine.answer = "Another one."
    forget("--tenant", "local")
    assert {ask() for _ in range(12)} == {"Another one."}
    until(lambda: both_have_it(4))


def test_sigterm_ends_every_worker_and_the_answers_in_flight(
    begin: Callable[..., Process], own_engine: FakeEngine
) -> None:
    own_engine.pause = 0.05
    gateway = begin("--workers", "2").ready()
    workers = [psutil.Process(worker["pid"]) for worker in gateway.told["workers"]]
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(gateway.ask, stream=True) for _ in range(4)]
        until(lambda: own_engine.open == 4)
        gateway.process.terminate()
        assert {events(answer.result())[-1] for answer in slow} == {"[DONE]"}
    assert gateway.process.wait(20) == 0
    assert not any(worker.is_running() for worker in workers)


def test_workers_end_when_their_supervisor_is_killed(begin: Callable[..., Process]) -> None:
    gateway = begin("--workers", "2").ready()
    workers = [psutil.Process(worker["pid"]) for worker in gateway.told["workers"]]
    gateway.process.kill()
    until(lambda: not any(worker.is_running() for worker in workers), 20)


def test_readiness_ends_at_once_and_the_listener_after_the_notice(
    begin: Callable[..., Process], own_engine: FakeEngine
) -> None:
    own_engine.pause = 0.1
    gateway = begin("--drain-notice", "1").ready()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.ask, stream=True)
        until(lambda: own_engine.open == 1)
        gateway.process.terminate()
        until(lambda: gateway.client.get("/readyz").status_code == 503, 0.9)
        assert gateway.client.get("/readyz").json()["problem"] == "the gateway is shutting down"
        assert gateway.ask().status_code == 200  # who comes in spite of it is served
        assert events(slow.result())[-1] == "[DONE]"
    assert gateway.process.wait(20) == 0


def test_an_answer_that_outlives_the_drain_is_ended(
    begin: Callable[..., Process], own_engine: FakeEngine
) -> None:
    gateway = begin("--drain-timeout", "1").ready()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(gateway.ask, text="fault:hang", stream=True)
        until(lambda: own_engine.open == 1)
        gateway.process.terminate()
        assert gateway.process.wait(20) == 0
        with contextlib.suppress(httpx.TransportError):
            assert hanging.result().status_code >= 499
    until(lambda: own_engine.open == 0)


def test_a_changed_file_is_taken_and_a_bad_one_is_not(
    begin: Callable[..., Process], own_engine: FakeEngine
) -> None:
    gateway = begin("--workers", "2").ready()
    own = [worker["url"] for worker in gateway.told["workers"]]

    def names() -> list[list[str]]:
        return [httpx.get(url + "/readyz").json()["models"] for url in own]

    assert names() == [["a"], ["a"]]
    gateway.file.write_text(config(own_engine.url, "a", "b"))
    until(lambda: names() == [["a", "b"]] * 2)
    assert gateway.ask("b").status_code == 200
    gateway.file.write_text(config(own_engine.url, "c") + "surprise: 1\n")
    until(lambda: gateway.log().count("the configuration was not taken") == 2)
    assert "surprise" in gateway.log()
    assert names() == [["a", "b"]] * 2
    assert gateway.ask("b").status_code == 200


def test_sighup_reads_the_file_again(begin: Callable[..., Process], own_engine: FakeEngine) -> None:
    gateway = begin("--workers", "2").ready()
    before = gateway.log().count("the configuration was read again")
    gateway.process.send_signal(signal.SIGHUP)  # the file is the same: only the signal says so
    until(lambda: gateway.log().count("the configuration was read again") == before + 2)
    assert gateway.ask().status_code == 200


def test_what_cannot_be_served_ends_with_a_reason(begin: Callable[..., Process]) -> None:
    for arguments in ((), ("--workers", "2")):
        gateway = begin(*arguments, text="surprise: 1\n")
        assert gateway.process.wait(20) not in (0, -signal.SIGTERM)
        assert "surprise" in gateway.log() and "Traceback" not in gateway.log()
