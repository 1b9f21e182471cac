"""Rollouts through a real gateway over HTTP, with the real controller; engines are fakes.

Every candidate that is bad in one way is taken back within the request budget that is stated here
for the test's policy; candidates that are equal are promoted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from contracts.settings import Settings
from resources import releases
from resources.ledger import Entry, Ledger
from serving.gateway.config import GatewayConfig
from serving.rollout.controller import Controller
from tests.serving.conftest import Running, impatient, until
from tests.serving.fake_engine import FakeEngine
from tests.serving.rollouts import GOOD, FileEngines, controller, deployed, install, quick

#: Requests of both arms, the reference of 20 among them, within which a bad candidate is gone.
BUDGET = 500
SECRET = "Write to ann.lee@uni-bonn.de [1]"


def guarded() -> GatewayConfig:
    """Answers with an e-mail address in them are withheld."""
    policy = {"output": {"pii": {"action": "block"}}}
    return impatient(guard="p", guards={"policies": {"p": policy}})


@contextmanager
def ticking(found: Controller) -> Iterator[None]:
    """The controller at work beside the test, as `watch` does it."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            found.tick()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def ended(settings: Settings) -> Entry | None:
    """The row that ended the rollout."""
    last = Ledger.open(settings).last("stable")
    return last if last is not None and last.kind in ("promoted", "rolled_back") else None


def traffic(gateway: Running, settings: Settings, most: int) -> tuple[int, list[Any]]:
    """Ask until the rollout has ended; how many were asked, and what was answered."""
    found: list[Any] = []
    with ThreadPoolExecutor(4) as pool:
        while ended(settings) is None:
            assert len(found) < most, "the request budget is spent"
            found += pool.map(lambda n: gateway.ask(f"x{n}"), range(len(found), len(found) + 20))
    return len(found), found


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "failing": ("floor errors", {"fault": "500"}),
    "gone": ("floor errors", {"stopped": True}),
    "breaking off": ("floor errors", {"fault": "reset-mid"}),
    "slow": ("ttft", {"pause": 0.25}),
    "unsafe": ("floor unsafe", {"answer": SECRET}),
    "worse": ("quality", {"answer": "Something else entirely, and no source"}),
    "refusing": ("refusals", {"answer": "The documents do not say."}),
    "dear": ("cost", {"words": "."}),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BAD)
def test_a_bad_candidate_is_gone_within_its_budget(
    settings: Settings, start: Callable[..., Running], how: str
) -> None:
    reason, broken = BAD[how]
    first, second = install(settings, "one"), install(settings, "two")
    with FakeEngine(answer=GOOD) as a, FakeEngine(answer=GOOD) as b:
        for name, value in broken.items():
            if name != "stopped":
                setattr(b, name, value)
        if "stopped" in broken:
            b.stop()
        deployed(settings, first, a.url)
        gateway = start(config=guarded()).ready()
        found = controller(settings, FileEngines(settings, {second: b.url}))
        found.begin(second, quick(), "canary")
        with ticking(found):
            asked, answers = traffic(gateway, settings, BUDGET)
        row = ended(settings)
        assert row is not None and row.kind == "rolled_back" and reason in row.reason
        assert asked <= BUDGET
        until(lambda: gateway.client.get("/readyz").json()["candidate"] is None)
        assert gateway.ask("x").headers["x-ratchet-release"] == first
    if how in ("failing", "gone"):  # nobody noticed
        assert {answer.status_code for answer in answers} == {200}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["canary", "ab", "shadow", "blue_green"])
def test_equal_candidates_are_promoted(
    settings: Settings, start: Callable[..., Running], strategy: Any
) -> None:
    """Three one after the other: each candidate is the next one's stable release."""
    names = [install(settings, mark) for mark in ("one", "two", "three", "four")]
    with FakeEngine(answer=GOOD) as a, FakeEngine(answer=GOOD) as b:
        urls = {name: (a, b)[n % 2].url for n, name in enumerate(names)}
        deployed(settings, names[0], a.url)
        gateway = start().ready()
        found = controller(settings, FileEngines(settings, urls))
        for name in names[1:]:
            found.begin(name, quick(), strategy)
            with ticking(found):
                _, answers = traffic(gateway, settings, 3000)
            row = ended(settings)
            assert row is not None and row.kind == "promoted", row and row.reason
            until(lambda name=name: gateway.client.get("/readyz").json()["release"] == name)
            assert {answer.status_code for answer in answers} == {200}
        pointer = releases.read_channel(settings, "stable")
        assert pointer is not None and pointer.release == names[-1]
    assert Ledger.open(settings).verify() == []


def test_a_broken_floor_takes_effect_at_once(
    settings: Settings, start: Callable[..., Running]
) -> None:
    """A candidate that begins to fail while it has half of the traffic: from its first failure to
    the last request that it was given, less than two seconds of real time."""
    first, second = install(settings, "one"), install(settings, "two")
    policy = quick(canary=[{"share": 0.5, "answers": 100_000}])
    with FakeEngine(answer=GOOD) as a, FakeEngine(answer=GOOD) as b:
        deployed(settings, first, a.url)
        gateway = start().ready()
        found = controller(settings, FileEngines(settings, {second: b.url}))
        found.begin(second, policy, "canary")
        answers: list[tuple[float, Any]] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                answers.append((time.monotonic(), gateway.ask("x")))

        with ticking(found), ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(client)
            try:
                until(lambda: any(r.headers["x-ratchet-release"] == second for _, r in answers), 30)
                broken = time.monotonic()
                b.fault = "500"
                until(lambda: ended(settings) is not None, 30)
                decided = time.monotonic()
                until(lambda: gateway.client.get("/readyz").json()["candidate"] is None)
                gone = time.monotonic()
            finally:
                stop.set()
    row = ended(settings)
    assert row is not None and row.kind == "rolled_back" and "floor errors" in row.reason
    assert gone - decided < 1.0
    assert gone - broken < 10.0  # most of it waits for requests, which have a loaded machine
    assert {answer.status_code for _, answer in answers} == {200}
