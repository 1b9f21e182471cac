"""A release switch under load: nothing fails, nothing is mixed, what was begun is finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from contracts.settings import Settings
from resources import releases
from resources import requests as request_log
from resources.keys import KeyStore
from tests.serving.conftest import Running, events, until
from tests.serving.factory import build, open_json_live, point
from tests.serving.fake_engine import FakeEngine

#: The engine says who it is and what mark the prompt bore; citations bring the index's mark.
ECHO = "prompt {mark} engine %s [1]"


def two(settings: Settings) -> tuple[str, str]:
    """Two installed releases, marked `one` and `two`."""
    found = []
    for mark in ("one", "two"):
        root = settings.root / mark
        found.append(releases.install(build(root, mark), root, settings).name)
    return found[0], found[1]


def marks(body: Any) -> set[str]:
    """Every mark in an answer: of its prompt, its engine and its passages."""
    words = body["choices"][0]["message"]["content"].split()
    return {words[1], words[3], body["citations"][0]["text"].rsplit(" ", 1)[1]}


def test_a_switch_under_load_mixes_nothing_and_fails_nothing(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        point(settings, first, a.url)
        gateway = start().ready()
        stop = threading.Event()
        answers: list[Any] = []

        def client() -> None:
            while not stop.is_set():
                answers.append(gateway.ask("x"))

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(client)
            until(lambda: len(answers) > 10)
            point(settings, second, b.url)
            until(lambda: answers[-1].headers.get("x-ratchet-release") == second)
            a.stop()  # the old engine is ended only now
            count = len(answers)
            until(lambda: len(answers) > count + 10)
            stop.set()
    assert {answer.status_code for answer in answers} == {200}
    by_release = {
        (answer.headers["x-ratchet-release"], *sorted(marks(answer.json()))) for answer in answers
    }
    assert by_release == {(first, "one"), (second, "two")}


def test_an_answer_that_has_begun_ends_on_its_release(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one", pause=0.15) as a, FakeEngine(answer=ECHO % "two") as b:
        point(settings, first, a.url)
        gateway = start().ready()
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(gateway.ask, "x", stream=True)
            until(lambda: a.open == 1)
            point(settings, second, b.url)
            until(lambda: gateway.client.get("/readyz").json()["release"] == second)
            assert a.open == 1
            chunks = events(slow.result())
    assert chunks[-1] == "[DONE]" and chunks[-2]["release"] == first
    assert chunks[-2]["citations"][0]["text"].endswith("one")


@pytest.mark.parametrize("restricted", [False, True])
def test_an_engine_that_was_ended_before_the_switch_was_seen_costs_nothing(
    settings: Settings, start: Callable[..., Running], restricted: bool
) -> None:
    """The request runs again, whole, on the new release; not for a key of the old one alone."""
    first, second = two(settings)
    token = KeyStore.open(settings).create("acme", "a", releases=[first]).token
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        point(settings, first, a.url)
        gateway = start().ready()
        live = gateway.gateway.live
        original = live.refresh
        frozen = threading.Event()

        async def refresh(*, force: bool = False) -> bool:
            return False if frozen.is_set() and not force else await original()

        async def asked() -> bool:
            return await refresh(force=True)

        live.refresh = refresh  # type: ignore[method-assign] # the watcher sleeps from here on
        frozen.set()
        point(settings, second, b.url)
        a.stop()
        assert live.current is not None and live.current.release == first
        live.refresh = asked  # type: ignore[method-assign]
        if restricted:
            until(lambda: gateway.gateway.services.authenticator.problem is None)
            gateway.client.headers["authorization"] = f"Bearer {token}"
        response = gateway.ask("x")
    if restricted:
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        return
    assert response.status_code == 200
    assert response.headers["x-ratchet-release"] == second
    assert marks(response.json()) == {"two"}


def test_a_release_that_cannot_be_opened_leaves_the_old_one_serving(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine() as engine:
        point(settings, first, engine.url)
        gateway = start().ready()
        (settings.releases_dir / second / "index" / "chunks.json").unlink()
        point(settings, second, engine.url)
        until(lambda: gateway.client.get("/readyz").json()["switching"])
        ready = gateway.client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["release"] == first
        assert "cannot be opened" in ready.json()["switching"]
        assert gateway.ask("x").headers["x-ratchet-release"] == first


def test_the_first_request_waits_for_the_first_release(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    gate, really = threading.Event(), open_json_live(settings)

    def slowly(channel: Any) -> Any:
        assert gate.wait(10)
        return really(channel)

    gateway = start(open_live=slowly)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.ask, "x")
        until(lambda: gateway.metric("ratchet_gateway_in_flight") == 1)
        assert gateway.client.get("/readyz").status_code == 503
        gate.set()
        assert answer.result().status_code == 200


def test_stopping_drains_answers_and_flushes_the_log(
    settings: Settings, release: str, own_engine: FakeEngine, start: Callable[..., Running]
) -> None:
    point(settings, release, own_engine.url)
    gateway = start().ready()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.ask, "fault:slow", stream=True)
        until(lambda: own_engine.open == 1)
        gateway.server.should_exit = True
        response = slow.result()
    gateway.thread.join(10)
    assert events(response)[-1] == "[DONE]"
    record = request_log.find(settings, response.headers["x-ratchet-response-id"])
    assert record is not None and record.error is None
    assert not list(settings.requests_dir.glob("*/.*"))  # no journal is left
