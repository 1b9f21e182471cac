"""The gate's statistics against published figures and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from stages.gating import families, paired, spending

SEED = 3


def test_spending_gives_the_published_boundaries() -> None:
    """O'Brien-Fleming spending, 2.5 % one-sided, three equal looks (Lan and DeMets 1983; Jennison
    and Turnbull 2000): 3.710, 2.511, 1.993."""
    levels = spending.levels(0.025, (1 / 3, 2 / 3, 1.0))
    assert [float(norm.isf(level)) for level in levels] == pytest.approx(
        [3.710, 2.511, 1.993], abs=2e-3
    )
    assert spending.levels(0.05, (1.0,)) == pytest.approx((0.05,))


def test_three_looks_spend_what_one_may() -> None:
    rng = np.random.default_rng(SEED)
    fractions = (0.3, 0.6, 1.0)
    steps = rng.normal(size=(200_000, 3)) * np.sqrt(np.diff((0.0, *fractions)))
    z = steps.cumsum(axis=1) / np.sqrt(fractions)
    bounds = norm.isf(spending.levels(0.05, fractions))
    assert (z > bounds).any(axis=1).mean() == pytest.approx(0.05, abs=0.002)
    assert (z > norm.isf(0.05)).any(axis=1).mean() > 0.09  # what looking freely would cost


@pytest.mark.parametrize("fractions", [(), (0.5, 0.5), (0.0, 1.0), (0.5, 1.2)])
def test_looks_that_do_not_grow_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="grow"):
        spending.levels(0.05, fractions)


def compare(
    mine: np.ndarray, theirs: np.ndarray, per: int, *, binary: bool = False, resamples: int = 1000
) -> paired.Comparison:
    clusters = [at // per for at in range(len(mine))]
    return paired.compare(
        mine.tolist(), theirs.tolist(), clusters, binary=binary, resamples=resamples, seed=7
    )


def test_mcnemar_is_the_exact_binomial_test_with_half_of_the_tie() -> None:
    mine, theirs = np.zeros(100), np.zeros(100)
    theirs[:9], mine[50:52] = 1, 1  # 9 lost, 2 won, every one a document of its own
    found = compare(mine, theirs, 1, binary=True)
    exact = binomtest(9, 11, alternative="greater").pvalue
    more = binomtest(10, 11, alternative="greater").pvalue
    assert found.p_worse() == pytest.approx((exact + more) / 2)
    assert found.mean == pytest.approx(-0.07)
    assert compare(theirs, theirs, 1, binary=True).p_worse() == 1.0


def test_newcombes_interval_of_unrelated_answers_is_that_of_two_wilson_limits() -> None:
    """Without correlation method 10 squares and adds the distances to Wilson's limits."""
    mine = np.array([1] * 24 + [1] * 16 + [0] * 36 + [0] * 24, float)
    theirs = np.array([1] * 24 + [0] * 16 + [1] * 36 + [0] * 24, float)  # 40 and 60 of 100
    found = compare(mine, theirs, 1, binary=True)
    (l1, u1), (l2, u2) = paired.wilson(0.4, 100, 1.96), paired.wilson(0.6, 100, 1.96)
    assert (l1, u1) == pytest.approx((0.3094, 0.4980), abs=1e-4)  # Wilson's, of 40 in 100
    low = -0.2 - ((0.4 - l1) ** 2 + (u2 - 0.6) ** 2) ** 0.5
    high = -0.2 + ((u1 - 0.4) ** 2 + (0.6 - l2) ** 2) ** 0.5
    assert (found.low(0.025), found.high(0.025)) == pytest.approx((low, high), abs=1e-4)


def test_questions_that_share_a_document_count_for_less() -> None:
    """Ten documents that flip as one are no more than ten observations."""
    mine, theirs = np.zeros(100), np.zeros(100)
    theirs[:40] = 1
    mine[90:] = 1
    together = compare(mine, theirs, 10, binary=True)
    apart = compare(mine, theirs, 1, binary=True)
    assert isinstance(together, paired.Discordant) and together.effect > 5
    assert together.p_worse() > 0.05 > apart.p_worse()
    assert together.high(0.05) > 0 > apart.high(0.05)


@pytest.mark.parametrize("binary", [False, True])
def test_equal_systems_are_called_worse_one_time_in_twenty(binary: bool) -> None:
    """600 comparisons over ten documents with luck of their own."""
    rng = np.random.default_rng(SEED)
    p_values = []
    for _ in range(600):
        luck = np.repeat(rng.normal(0, 0.05, 10), 10)
        share = rng.beta(2, 1, 100)
        if binary:
            mine = (rng.random(100) < share + luck).astype(float)
            theirs = (rng.random(100) < share).astype(float)
        else:
            mine, theirs = rng.normal(0, 0.2, 100) + luck, np.zeros(100)
        p_values.append(compare(mine, theirs, 10, binary=binary).p_worse())
    assert 0.025 <= np.mean(np.array(p_values) < 0.05) <= 0.08
    assert np.mean(np.array(p_values) < 0.001) <= 0.01


def test_bounds_and_p_value_are_one_thing() -> None:
    rng = np.random.default_rng(SEED)
    for shift in (-0.05, -0.01, 0.03):
        found = compare(rng.normal(shift, 0.2, 400), np.zeros(400), 10, resamples=4000)
        if (p := found.p_worse()) < 0.5:
            assert found.high(p) == pytest.approx(0.0, abs=2e-4)
        bounds = [found.low(level) for level in (1e-6, 1e-4, 0.01, 0.05, 0.2)]
        assert bounds == sorted(bounds) and bounds[-1] < found.mean


def test_a_skewed_loss_moves_both_bounds_downwards() -> None:
    """BCa corrects for skew: few documents lose much, most lose nothing."""
    loss = np.zeros(400)
    loss[:30] = -1.0
    found = compare(loss, np.zeros(400), 10, resamples=4000)
    assert isinstance(found, paired.Bca) and found.a < 0
    assert found.mean - found.low(0.05) > found.high(0.05) - found.mean


def test_a_few_answers_that_changed_show_nothing() -> None:
    """Two lost answers of 184, all else equal: a sign test says one case in four."""
    for lost, least in ((1, 0.5), (2, 0.25), (4, 0.0625)):
        loss = np.zeros(184)
        loss[: 10 * lost : 10] = -1.0
        found = compare(loss, np.zeros(184), 4)
        assert found.p_worse() >= least
        assert found.high(0.05) >= 0.0 or lost == 4
    whole = np.full(20, -1.0)  # every question lost alike has no spread at all
    assert compare(whole, np.zeros(20), 1).p_worse() == pytest.approx(0.5**20)


def test_systems_that_differ_in_few_answers_are_not_called_worse_too_often() -> None:
    """1,000 comparisons in which 4 % of 150 graded answers changed, as often up as down."""
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(1000):
        change = np.where(rng.random(150) < 0.04, rng.choice([-1.0, 1.0], 150), 0.0)
        found.append(compare(change * rng.random(150), np.zeros(150), 5).p_worse())
    assert np.mean(np.array(found) < 0.05) <= 0.07
    assert np.mean(np.array(found) < 0.01) <= 0.02


def test_power_and_the_detectable_loss_fit_together() -> None:
    loss = paired.detectable(0.02, 0.05)
    assert loss == pytest.approx((1.645 + 0.842) * 0.02, rel=1e-3)
    assert paired.power_at(loss, 0.02, 0.05) == pytest.approx(0.8)


def test_holm_stops_at_the_first_that_does_not_hold() -> None:
    p_values = {"a": 0.001, "b": 0.02, "c": 0.03, "d": 0.9}
    assert paired.holm(p_values, lambda count: 0.05 / count) == {"a"}
    assert paired.holm({"a": 0.001, "b": 0.02}, lambda count: 0.05 / count) == {"a", "b"}


@pytest.mark.parametrize(("n", "bound"), [(24, 0.8827), (59, 0.9505), (300, 0.9901)])
def test_without_a_failure_the_rule_of_three_holds(n: int, bound: float) -> None:
    found = families.lower_bound(n, n)
    assert found == pytest.approx(bound, abs=1e-4)
    assert found == pytest.approx(1 - 3 / n, abs=0.01)
    assert families.lower_bound(0, n) == 0.0


def test_order_statistics_bound_a_quantile() -> None:
    """The true 95th percentile lies under the upper bound in 95 % of samples of 100."""
    rng = np.random.default_rng(SEED)
    held = [families.order_interval(rng.random(100).tolist(), 0.95) for _ in range(2000)]
    assert np.mean([low <= 0.95 for low, _ in held if low is not None]) >= 0.94
    assert np.mean([high >= 0.95 for _, high in held if high is not None]) >= 0.94
    assert families.order_interval([1.0] * 32, 0.95)[1] is None  # 59 are needed
