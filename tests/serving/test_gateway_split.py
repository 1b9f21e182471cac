"""A channel with a candidate: who gets it, what is told of it, and how it goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
import pytest

from contracts.records import Candidate, Channel
from contracts.settings import Settings
from resources import releases
from resources import requests as request_log
from resources.keys import KeyStore
from serving.gateway.exchange import Exchange
from serving.gateway.split import takes
from tests.serving.conftest import Running, events, until
from tests.serving.fake_engine import FakeEngine
from tests.serving.rollouts import Traffic
from tests.serving.test_gateway_switch import ECHO, marks, two


def split(
    settings: Settings, stable: tuple[str, str], candidate: tuple[str, str] | None,
    share: float = 0.5, strategy: Any = "canary", rollout: str = "r-1",
) -> None:  # fmt: skip
    """Write the channel's file; releases with their engines' addresses."""
    tried = candidate and Candidate(
        release=candidate[0], engine_url=candidate[1], model="nano", strategy=strategy,
        share=share, rollout=rollout,
    )  # fmt: skip
    releases.write_channel(
        settings,
        Channel(
            name="stable", release=stable[0], engine_url=stable[1], model="nano", candidate=tried
        ),
    )


def rows(gateway: Running, count: int) -> list[dict[str, Any]]:
    """So many rows of the request log, of today and yesterday (midnight may pass)."""

    def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for day in request_log.days(gateway.settings):
            found += request_log.read_day(gateway.settings, day).to_pylist()
        return found if len(found) >= count else []

    return until(read)


def trying(gateway: Running, share: float | None) -> None:
    """Wait until the gateway has that share; None: no candidate."""

    def seen() -> bool:
        said = gateway.client.get("/readyz").json()["candidate"]
        if share is None:
            return said is None
        return bool(said) and said["share"] == share

    until(seen)


def test_place_of_a_session_is_even_sticky_and_grows_with_the_share() -> None:
    def candidate(share: float, rollout: str = "r") -> Candidate:
        return Candidate(
            release="a", engine_url="u", model="m", strategy="canary", share=share, rollout=rollout
        )

    def chosen(share: float, tenant: str = "t", rollout: str = "r") -> set[int]:
        tried = candidate(share, rollout)
        return {
            n for n in range(4000) if takes(tried, Exchange("", session=f"s{n}"), tenant, b"k" * 32)
        }

    small, large = chosen(0.1), chosen(0.3)
    assert small < large and 330 < len(small) < 470 and 1100 < len(large) < 1300
    assert chosen(0.1) == small
    assert chosen(0) == set() and len(chosen(1)) == 4000
    for other in (chosen(0.1, tenant="u"), chosen(0.1, rollout="r2")):
        assert len(other & small) < 80  # 40 by chance
    unnamed = [takes(candidate(0.5), Exchange("", response_id=f"i{n}"), "t", b"k") for n in (1, 1)]
    assert unnamed[0] == unnamed[1]


def test_sessions_stay_and_nothing_is_mixed(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        split(settings, (first, a.url), (second, b.url), share=0.4)
        gateway = start().ready()
        trying(gateway, 0.4)
        seen: dict[str, set[str]] = {}

        def ask(n: int) -> Any:
            name = f"s{n % 30}"
            response = gateway.client.post(
                "/v1/chat/completions",
                json={"model": "stable", "messages": [{"role": "user", "content": f"x{n}"}]},
                headers={"x-session-id": name},
            )
            release = response.headers["x-ratchet-release"]
            assert response.json()["release"] == release
            assert marks(response.json()) == {"one" if release == first else "two"}
            seen.setdefault(name, set()).add(release)
            return response

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(90)))
        assert all(len(found) == 1 for found in seen.values())
        before = {name for name, found in seen.items() if found == {second}}
        assert 3 <= len(before) <= 21

        split(settings, (first, a.url), (second, b.url), share=0.8)
        trying(gateway, 0.8)
        seen.clear()
        for n in range(30):
            ask(n)
        assert before < {name for name, found in seen.items() if found == {second}}
        log = rows(gateway, 120)
    assert {(row["arm"], row["release"], row["rollout"]) for row in log} == {
        ("stable", first, "r-1"),
        ("candidate", second, "r-1"),
    }
    ok = sum(
        gateway.metric("ratchet_gateway_rollout_requests_total", arm=arm, outcome="ok")
        for arm in ("stable", "candidate")
    )
    assert ok == 120


@pytest.mark.parametrize("fault", ["", "500", "reset-first", "error-first", "404"])
def test_a_candidate_that_cannot_answer_costs_nobody_an_answer(
    settings: Settings, start: Callable[..., Running], fault: str
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        split(settings, (first, a.url), (second, b.url), share=1.0)
        gateway = start().ready()
        trying(gateway, 1.0)
        assert gateway.ask("x").headers["x-ratchet-release"] == second
        b.fault = fault
        if not fault:
            b.stop()
        answers = [gateway.ask("x", stream=False), gateway.ask("x", stream=True)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert {answer.headers["x-ratchet-release"] for answer in answers} == {first}
        assert marks(answers[0].json()) == {"one"}
        assert events(answers[1])[-2]["release"] == first
        log = rows(gateway, 3)
    moved = [row for row in log if row["release"] == first]
    assert [(row["arm"], row["error"], row["rollout"]) for row in moved] == [
        ("candidate", None, "r-1")
    ] * 2
    said = gateway.metric(
        "ratchet_gateway_rollout_requests_total", arm="candidate", outcome="moved"
    )
    assert said == 2


def test_a_candidate_that_breaks_off_is_its_own_failure(
    settings: Settings, start: Callable[..., Running]
) -> None:
    """After the first word there is no way back: the client is told, and the log."""
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        split(settings, (first, a.url), (second, b.url), share=1.0)
        gateway = start().ready()
        trying(gateway, 1.0)
        b.fault = "reset-mid"
        broken = events(gateway.ask("x", stream=True))
        assert broken[-1]["error"]["code"] == "engine_disconnected"
        (row,) = rows(gateway, 1)
    assert (row["arm"], row["release"], row["error"]) == (
        "candidate", second, "engine_disconnected",
    )  # fmt: skip


def test_a_candidate_that_cannot_be_opened_is_counted_and_bothers_nobody(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a:
        split(settings, (first, a.url), None)
        gateway = start().ready()
        (settings.releases_dir / second / "index" / "chunks.json").unlink()
        split(settings, (first, a.url), (second, a.url), share=1.0)
        trying(gateway, 1.0)
        assert gateway.client.get("/readyz").json()["candidate"]["open"] is False
        assert gateway.client.get("/readyz").status_code == 200
        assert gateway.ask("x").headers["x-ratchet-release"] == first
        (row,) = rows(gateway, 1)
    assert (row["arm"], row["release"]) == ("candidate", first)


def test_a_key_that_may_not_use_the_candidate_takes_no_part(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    token = KeyStore.open(settings).create("acme", "a", releases=[first]).token
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        split(settings, (first, a.url), (second, b.url), share=1.0)
        gateway = start().ready()
        trying(gateway, 1.0)
        until(lambda: gateway.gateway.services.authenticator.problem is None)
        gateway.client.headers["authorization"] = f"Bearer {token}"
        assert gateway.ask("x").headers["x-ratchet-release"] == first
        (row,) = rows(gateway, 1)
    assert (row["arm"], row["rollout"]) == ("", "")


def test_taking_it_back_takes_less_than_a_second_and_breaks_nothing(
    settings: Settings, start: Callable[..., Running]
) -> None:
    """Measured from the rename of the pointer to the last answer of the candidate that began."""
    first, second = two(settings)
    with (
        FakeEngine(answer=ECHO % "one") as a,
        FakeEngine(answer=ECHO % "two", pause=0.1) as b,
    ):
        split(settings, (first, a.url), (second, b.url), share=1.0)
        gateway = start().ready()
        trying(gateway, 1.0)
        stop = threading.Event()
        found: list[tuple[float, Any]] = []

        def client() -> None:
            while not stop.is_set():
                asked = time.monotonic()
                found.append((asked, gateway.ask("x", stream=True)))

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(client)
            try:
                until(lambda: len(found) > 8)
                flipped = time.monotonic()
                split(settings, (first, a.url), None)
                until(lambda: found[-1][1].headers["x-ratchet-release"] == first)
                count = len(found)
                until(lambda: len(found) > count + 20)
            finally:
                stop.set()
    assert {answer.status_code for _, answer in found} == {200}
    late = [at - flipped for at, r in found if r.headers["x-ratchet-release"] == second]
    assert max(late) < 1.0
    for _, answer in found:  # what was begun was ended where it began
        said = events(answer)
        assert said[-1] == "[DONE]" and said[-2]["release"] == answer.headers["x-ratchet-release"]
    assert gateway.client.get("/readyz").json()["candidate"] is None


def test_promotion_opens_nothing_again(settings: Settings, start: Callable[..., Running]) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two") as b:
        split(settings, (first, a.url), (second, b.url), share=0.5)
        gateway = start().ready()
        trying(gateway, 0.5)
        trial = gateway.gateway.live.trial
        assert trial is not None and trial.live is not None
        split(settings, (second, b.url), None)
        until(lambda: gateway.client.get("/readyz").json()["release"] == second)
        assert gateway.gateway.live.current.rag is trial.live.rag  # type: ignore[union-attr]
        assert gateway.ask("x").headers["x-ratchet-release"] == second


def test_a_shadow_answers_nobody_and_leaves_one_row(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine(answer=ECHO % "two", pause=0.2) as b:
        split(settings, (first, a.url), (second, b.url), share=1.0, strategy="shadow")
        gateway = start().ready()
        trying(gateway, 1.0)
        requests = gateway.metric(
            "ratchet_gateway_requests_total", code="ok", status="200", stream="false"
        )
        began = time.monotonic()
        answer = gateway.ask("x", user="somebody")
        seconds = time.monotonic() - began
        assert answer.headers["x-ratchet-release"] == first and marks(answer.json()) == {"one"}
        log = {row["arm"]: row for row in rows(gateway, 2)}
        assert seconds < 0.8  # the copy takes 6 x 0.2 s
        assert set(log) == {"stable", "shadow"}
        copy = log["shadow"]
        assert (copy["release"], copy["error"], copy["rollout"]) == (second, None, "r-1")
        assert copy["answer"].startswith("prompt two engine two") and copy["ttft_ms"] > 0
        assert copy["response_id"] != answer.headers["x-ratchet-response-id"]
        assert len(b.bodies) == 1
        after = gateway.metric(
            "ratchet_gateway_requests_total", code="ok", status="200", stream="false"
        )
        assert after == requests + 1
        exposures = [
            gateway.metric("ratchet_gateway_prompt_exposures_total", prompt_version=version)
            for version in ("answer/v1",)
        ]
        assert exposures == [1]


def test_copies_are_not_among_the_requests_of_a_day(settings: Settings) -> None:
    traffic = Traffic(settings)
    split(settings, ("one", "u"), ("two", "v"), share=0.5, strategy="shadow")
    traffic.answers(10, arm="shadow")
    traffic.roll()
    (day,) = request_log.days(settings)
    out = settings.state_dir / "day.parquet"
    assert request_log.main(["--day", day, "--out", str(out)]) == 0
    assert pq.read_table(out)["arm"].to_pylist() == ["stable"] * 5
    assert request_log.read_day(settings, day).num_rows == 10


def test_a_shadow_that_hangs_is_dropped_and_delays_nobody(
    settings: Settings, start: Callable[..., Running]
) -> None:
    first, second = two(settings)
    with FakeEngine(answer=ECHO % "one") as a, FakeEngine() as b:
        b.fault = "hang"
        split(settings, (first, a.url), (second, b.url), share=1.0, strategy="shadow")
        gateway = start().ready()
        trying(gateway, 1.0)
        for n in range(8):
            answer = gateway.ask(f"x{n}")
            assert answer.status_code == 200
            assert answer.headers["x-ratchet-release"] == first
        dropped = gateway.metric("ratchet_gateway_shadow_requests_total", outcome="dropped")
        assert dropped == 4
        until(lambda: len(b.bodies) == 4)
        copies = [row for row in rows(gateway, 12) if row["arm"] == "shadow"]
    assert {row["error"] for row in copies} == {"engine_timeout"} and len(copies) == 4
