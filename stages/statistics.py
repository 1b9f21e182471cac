"""Means with honest intervals: what questions share, their document, is resampled together.

In: numbers and the clusters that they belong to. Out: means, bootstrap samples, percentiles. The
only randomness is a seeded generator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


def percentile(values: Iterable[float], share: float) -> float | None:
    """Nearest-rank percentile (``share`` in [0, 1]), or None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return round(
        ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))], 3
    )


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval. ``unit`` is what was resampled."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int
    unit: Literal["document", "question"]


#: Under this many documents a cluster bootstrap is far too narrow; questions are resampled instead.
MIN_CLUSTERS = 5


def resampled_means(
    values: Sequence[float], clusters: Sequence[Hashable], resamples: int, seed: int
) -> tuple[np.ndarray, Literal["document", "question"]]:
    """Bootstrap means: whole clusters are drawn with replacement, because questions about one
    document share its luck.

    Returns:
        (means of shape (resamples,), the unit drawn). With fewer than :data:`MIN_CLUSTERS` clusters
        the unit is the question, and the interval is optimistic: callers say so.
    """
    import numpy as np

    names = list(dict.fromkeys(clusters))
    unit: Literal["document", "question"] = "document"
    if len(names) < MIN_CLUSTERS:
        names, clusters, unit = list(range(len(values))), range(len(values)), "question"
    position = {name: index for index, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, cluster in zip(values, clusters, strict=True):
        sums[position[cluster]] += value
        counts[position[cluster]] += 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return (weights @ sums) / (weights @ counts), unit


def estimate(
    values: Sequence[float], clusters: Sequence[Hashable], resamples: int, seed: int
) -> Estimate:
    """Mean and two-sided 95 % percentile interval. Raises ValueError without values."""
    import numpy as np

    if not values:
        raise ValueError("no values to average")
    means, unit = resampled_means(values, clusters, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(
        mean=_tidy(sum(values) / len(values)),
        low=_tidy(low),
        high=_tidy(high),
        n=len(values),
        clusters=len(set(clusters)),
        unit=unit,
    )


def _tidy(value: float) -> float:
    """Six decimals: enough to read, and equal on machines whose sums differ in the last bit."""
    return round(float(value), 6) + 0.0
