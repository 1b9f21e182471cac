"""The retry budget."""

from __future__ import annotations

import random

from serving.gateway.routing.budget import RetryBudget


def test_retries_are_a_share_of_requests_after_the_burst() -> None:
    budget = RetryBudget(0.1, 10)
    granted = 0
    for _ in range(1000):  # a dead upstream: every request wants two retries
        budget.request()
        granted += budget.retry() + budget.retry()
    assert granted == 10 + 100 - 1  # the first deposit found a full bucket


def test_quiet_times_save_no_more_than_the_burst() -> None:
    budget = RetryBudget(0.5, 3)
    for _ in range(100):
        budget.request()
    assert [budget.retry() for _ in range(4)] == [True, True, True, False]


def test_ten_tenths_are_one() -> None:
    budget = RetryBudget(0.1, 1)
    assert budget.retry()
    for _ in range(10):
        assert not budget.retry()
        budget.request()
    assert budget.retry()


def test_never_more_than_promised_in_any_order() -> None:
    choice = random.Random(5)
    for _ in range(50):
        ratio, burst = choice.choice([0.0, 0.1, 0.3]), choice.choice([0.0, 1.0, 5.0])
        budget = RetryBudget(ratio, burst)
        requests = granted = 0
        for _ in range(300):
            if choice.random() < 0.5:
                budget.request()
                requests += 1
            else:
                granted += budget.retry()
            assert granted <= burst + ratio * requests + 1e-6
