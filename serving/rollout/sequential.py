"""Tests that may be looked at after every request: is the candidate worse, is it shown not to be?

Everything measured is a *loss* of one answer in [0, 1]: failed or not, slower than a fixed bound
or not, one minus its quality. A :class:`Sample` is the histogram of one arm's losses, so a test
depends on counts alone: a controller that starts anew, or reads the log in another order, decides
the same.

The evidence is an e-value: the wealth of somebody who bets against a hypothesis at fair odds and
whose expected wealth, while the hypothesis holds, is at most 1 at every moment at which he may stop
(Waudby-Smith and Ramdas, *Estimating means of bounded random variables by betting*, 2024). By
Ville's inequality it ever reaches 1/alpha with probability alpha at most, however often one looks.
One bettor does not know how large the difference is, so the wealth is the mean over many stakes.

Two arms: the hypothesis "the candidate's mean is at most the stable arm's plus a margin" holds if
it holds for the stable arm's true mean m. For that m two bets are fair at once: candidate above
m + margin, stable below m. Nobody knows m, so the smallest product over all m counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Steps of the grid that losses are rounded to: 0, 0.05 ... 1. Shares use both ends of it.
LEVELS = 20
#: Stakes, as shares of the wealth that may be lost at once: from a hair to nearly everything.
_STAKES = np.geomspace(0.002, 0.98, 12)
_LOSSES = np.linspace(0.0, 1.0, LEVELS + 1)
#: Means tried, dense at both ends: errors are rare and good answers are the rule.
_MEANS = np.sin(np.linspace(0.0, np.pi / 2, 257)) ** 2
_TINY = 1e-9
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Losses of one arm. ``counts[i]`` of them were ``i / LEVELS``."""

    counts: tuple[int, ...] = (0,) * (LEVELS + 1)

    @classmethod
    def of(cls, losses: Iterable[float]) -> Sample:
        """Round losses, which lie in [0, 1], to the grid."""
        counts = [0] * (LEVELS + 1)
        for loss in losses:
            counts[round(min(max(loss, 0.0), 1.0) * LEVELS)] += 1
        return cls(tuple(counts))

    @classmethod
    def share(cls, hits: int, n: int) -> Sample:
        """``hits`` ones among ``n``."""
        return cls((n - hits, *(0,) * (LEVELS - 1), hits))

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None without a loss."""
        return float(np.dot(self.counts, _LOSSES)) / self.n if self.n else None

    def mirrored(self) -> Sample:
        """Of one minus each loss."""
        return Sample(self.counts[::-1])


def worse(stable: Sample, candidate: Sample, margin: float) -> float:
    """Log of the evidence that the candidate's mean loss exceeds the stable arm's by more than
    ``margin``. Compare with ``log(1 / alpha)``."""
    # Between two grid points the first factor falls and the second one rises.
    over = _above(candidate, margin)[1:]
    under = _below(stable, 0.0)[:-1]
    return float(np.min(over + under))


def no_worse(stable: Sample, candidate: Sample, margin: float) -> float:
    """Log of the evidence that the candidate's mean loss is below the stable arm's plus ``margin``.

    The margin of a loss that cannot grow by so much is met: nothing is to be shown above 1.
    """
    possible = _MEANS[:-1] + margin <= 1.0
    if not possible.any():
        return math.inf
    under = _below(candidate, margin)[:-1]
    over = _above(stable, 0.0)[1:]
    return float(np.min((under + over)[possible]))


def above(sample: Sample, bound: float) -> float:
    """Log of the evidence that the mean loss is above ``bound``."""
    return float(_combined(sample.counts, _logs(np.array([bound])))[0])


def broken(stable: Sample, candidate: Sample, floor: float) -> float:
    """Log of the evidence that the candidate's mean loss is above ``floor`` and above the stable
    arm's: an outage that hits both is no reason to take one of them back."""
    return min(above(candidate, floor), worse(stable, candidate, 0.0))


def interval(sample: Sample, alpha: float) -> tuple[float, float]:
    """Bounds that hold the mean loss at every look, with probability 1 - alpha."""
    limit = math.log(2 / alpha)
    low = _MEANS[_above(sample, 0.0) >= limit]
    high = _MEANS[_below(sample, 0.0) >= limit]
    return float(low[-1]) if low.size else 0.0, float(high[0]) if high.size else 1.0


def _above(sample: Sample, margin: float) -> Floats:
    """For each mean of the grid: the log wealth against "at most that plus the margin"."""
    return _combined(sample.counts, _table(margin, False))


def _below(sample: Sample, margin: float) -> Floats:
    """The same against "at least that plus the margin"."""
    return _combined(sample.counts[::-1], _table(margin, True))


@lru_cache(maxsize=64)
def _table(margin: float, mirrored: bool) -> Floats:
    bounds = _MEANS + margin
    return _logs(1.0 - bounds if mirrored else bounds)


def _logs(bounds: Floats) -> Floats:
    """Log wealth after one loss, by loss, stake and bound; bounds below 0 become nearly 0, where
    every loss but 0 is a fortune: who bets on less than nothing needs no evidence."""
    safe = np.maximum(bounds, _TINY)[None, None, :]
    stakes = _STAKES[None, :, None]
    return np.asarray(np.log((1 - stakes) + stakes * _LOSSES[:, None, None] / safe))


def _combined(counts: tuple[int, ...], logs: Floats) -> Floats:
    """By bound: the mean of the wealth over the stakes, in logs."""
    wealth = np.zeros(logs.shape[1:])
    for level, count in enumerate(counts):
        if count:
            wealth += count * logs[level]
    top = wealth.max(axis=0)
    found: Floats = top + np.log(np.exp(wealth - top).sum(axis=0) / len(_STAKES))
    return found
