"""Raw samples on disk, and what is said of them: percentiles, differences, intervals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOOTSTRAPS, SEED = 2000, 7


class Samples:
    """One CSV a lane: every single measurement, so that any other figure can be made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, lane: str, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Append rows; the first call of a run writes the names."""
        path = self.folder / f"{lane}.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(names)
            writer.writerows(rows)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.asarray(values), percent)) if len(values) else float("nan")


def added(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], percent: float
) -> tuple[float, float, float]:
    """How much more the percentile is, and its 95 % interval, in the unit of the samples.

    Args:
        ours, theirs: a list of samples a round; round i of both was measured at the same time.

    The estimate is the percentile of all samples against the percentile of all samples. Rounds are
    what is drawn again for the interval, because samples of one round share the machine's mood.
    """
    left, right = [np.asarray(row) for row in ours], [np.asarray(row) for row in theirs]

    def difference(rounds: Sequence[int]) -> float:
        first = np.concatenate([left[i] for i in rounds])
        second = np.concatenate([right[i] for i in rounds])
        return float(np.percentile(first, percent) - np.percentile(second, percent))

    draw = np.random.default_rng(SEED)
    count = min(len(left), len(right))
    found = [difference(draw.integers(0, count, count).tolist()) for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(found, [2.5, 97.5])
    return difference(range(count)), float(low), float(high)
