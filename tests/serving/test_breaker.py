"""The circuit breaker, on a clock of our own."""

from __future__ import annotations

import random

import pytest

from serving.gateway.routing.breaker import Breaker
from serving.gateway.routing.config import BreakerPolicy

POLICY = BreakerPolicy(
    failures=5, ratio=0.5, window_seconds=30, open_seconds=5, max_open_seconds=12
)


def opened(now: float = 100.0) -> Breaker:
    breaker = Breaker(POLICY)
    for _ in range(5):
        assert breaker.claim(now) is False
        breaker.failure(now)
    return breaker


def test_it_opens_at_enough_failures_and_not_before() -> None:
    breaker = Breaker(POLICY)
    for _ in range(4):
        breaker.failure(100)
    assert breaker.state == "closed" and breaker.ready(100)
    breaker.failure(100)
    assert breaker.state == "open" and not breaker.ready(100)
    assert not breaker.ready(104.9) and breaker.ready(105)


def test_few_failures_among_many_answers_do_not_open_it() -> None:
    breaker = Breaker(POLICY)
    for _ in range(100):
        breaker.success(100)
    for _ in range(99):
        breaker.failure(100)
    assert breaker.state == "closed"
    breaker.failure(100)  # half of all
    assert breaker.state == "open"


@pytest.mark.parametrize(("pause", "state"), [(5, "open"), (10, "closed")])
def test_the_window_rolls(pause: float, state: str) -> None:
    breaker = Breaker(POLICY)
    for number in range(5):  # the first and the last stand 20 s or 40 s from each other
        breaker.failure(100 + number * pause)
    assert breaker.state == state


def test_half_open_admits_exactly_one_probe() -> None:
    breaker = opened()
    assert breaker.ready(105)
    assert breaker.claim(105) is True
    assert breaker.state == "half_open"
    assert not any(breaker.ready(t) for t in (105, 106, 1e9))
    breaker.success(106, probe=True)
    assert breaker.state == "closed" and breaker.counts(106) == (0, 0)
    assert breaker.claim(106) is False


def test_a_failed_probe_doubles_the_wait_up_to_a_bound_and_success_resets_it() -> None:
    breaker, now = opened(), 105.0
    for wait in (10, 12, 12):
        assert breaker.claim(now)
        breaker.failure(now, probe=True)
        assert breaker.state == "open" and not breaker.ready(now + wait - 0.1)
        now += wait
        assert breaker.ready(now)
    assert breaker.claim(now)
    breaker.success(now, probe=True)
    for _ in range(5):
        breaker.failure(now)
    assert breaker.until == now + 5


def test_a_probe_that_says_nothing_makes_way_for_another() -> None:
    breaker = opened()
    assert breaker.claim(105)
    breaker.release(probe=True)
    assert breaker.ready(105) and breaker.claim(105)
    assert not breaker.ready(105)


def test_attempts_from_before_prove_nothing_later() -> None:
    breaker = opened()
    breaker.success(101)
    breaker.failure(101)
    assert breaker.state == "open" and breaker.until == 105
    assert breaker.claim(105)
    breaker.success(106)  # an old stream ends while the probe is under way
    breaker.failure(106)
    assert breaker.state == "half_open" and not breaker.ready(106)


def test_never_two_probes_in_any_order_of_events() -> None:
    choice = random.Random(3)
    breaker, now, under_way = Breaker(POLICY), 0.0, []
    probes = 0
    for _ in range(5000):
        now += choice.random()
        if choice.random() < 0.5 and breaker.ready(now):
            under_way.append(breaker.claim(now))
            probes += under_way[-1]
        elif under_way:
            probe = under_way.pop(choice.randrange(len(under_way)))
            end = choice.choice(["success", "failure", "failure", "release"])
            if end == "release":
                breaker.release(probe)
            else:
                getattr(breaker, end)(now, probe)
        assert sum(under_way) <= 1
        assert (sum(under_way) == 1) <= (breaker.state == "half_open")
    assert probes > 20
