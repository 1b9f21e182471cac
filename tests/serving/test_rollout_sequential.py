"""Evidence that may be looked at after every request: it holds what it promises, and sees harm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serving.rollout.sequential import LEVELS, Sample, above, broken, interval, no_worse, worse

S = Sample.share


def test_a_sample_keeps_what_its_losses_were() -> None:
    sample = Sample.of([0.0, 0.5, 0.52, 1.0, 1.0, -3.0, 7.0])
    assert sample.n == 7 and sample.counts[0] == 2 and sample.counts[LEVELS] == 3
    assert sample.mean == pytest.approx((0 + 0 + 0.5 + 0.5 + 3) / 7)
    assert S(3, 10).mean == pytest.approx(0.3) and Sample().mean is None


def test_wealth_is_that_of_the_best_known_stake_but_for_a_constant() -> None:
    """Of 30 ones among 100 against 0.1: the best stake in hindsight earns the likelihood ratio."""
    best = 30 * math.log(0.3 / 0.1) + 70 * math.log(0.7 / 0.9)
    assert best - 3.5 < above(S(30, 100), 0.1) < best


def test_nothing_is_evidence_of_nothing() -> None:
    assert worse(Sample(), Sample(), 0.02) <= 0 and no_worse(Sample(), Sample(), 0.02) <= 0
    assert worse(S(0, 1000), Sample(), 0.02) <= 0  # only one arm has answered
    assert interval(Sample(), 0.05) == (0.0, 1.0)


def test_more_harm_is_more_evidence_and_a_margin_takes_some_away() -> None:
    stable = S(5, 500)
    found = [worse(stable, S(bad, 50), 0.02) for bad in (0, 2, 5, 10, 50)]
    assert found == sorted(found) and found[0] < 0 < found[-1]
    assert worse(stable, S(10, 50), 0.1) < worse(stable, S(10, 50), 0.02)
    assert no_worse(stable, S(5, 500), 0.1) > no_worse(stable, S(5, 500), 0.05)


def test_a_margin_that_leaves_nothing_to_lose_is_met() -> None:
    assert no_worse(S(100, 100), S(100, 100), 0.3) > math.log(20)


def test_an_outage_of_both_arms_breaks_no_floor() -> None:
    assert broken(S(0, 100), S(20, 20), 0.2) > math.log(1000)
    assert broken(S(100, 100), S(20, 20), 0.2) < 0


@pytest.mark.parametrize(("rate", "margin", "share"), [(0.01, 0.02, 0.05), (0.3, 0.1, 0.5)])
def test_false_alarms_stay_below_alpha_at_the_edge_of_the_hypothesis(
    rate: float, margin: float, share: float
) -> None:
    """The candidate is worse by exactly the margin, and is looked at 30 times."""
    random, alarms, runs, alpha = np.random.default_rng(7), 0, 100, 0.05
    for _ in range(runs):
        a = b = ka = kb = 0
        for _ in range(30):
            n = int(random.binomial(50, share))
            a, b = a + 50 - n, b + n
            ka += int(random.binomial(50 - n, rate))
            kb += int(random.binomial(n, rate + margin))
            if worse(S(ka, a), S(kb, b), margin) >= math.log(1 / alpha):
                alarms += 1
                break
    assert alarms <= runs * alpha


def test_wrong_promotions_stay_below_beta_at_the_edge() -> None:
    random, shown, runs, beta = np.random.default_rng(11), 0, 100, 0.05
    for _ in range(runs):
        a = b = ka = kb = 0
        for _ in range(30):
            a, b = a + 40, b + 40
            ka += int(random.binomial(40, 0.1))
            kb += int(random.binomial(40, 0.2))
            if no_worse(S(ka, a), S(kb, b), 0.1) >= math.log(1 / beta):
                shown += 1
                break
    assert shown <= runs * beta


def test_scores_between_nought_and_one_count() -> None:
    """A mean that falls by 0.3 is seen, although no single answer is all wrong."""
    random = np.random.default_rng(3)
    stable = Sample.of(random.uniform(0.0, 0.4, 300))
    candidate = Sample.of(random.uniform(0.3, 0.7, 60))
    assert worse(stable, candidate, 0.1) > math.log(1000)
    low, high = interval(candidate, 0.05)
    assert low < 0.5 < high and high - low < 0.4
