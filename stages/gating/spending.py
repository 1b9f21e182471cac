"""How much error each look at the evidence may spend.

In: the total one-sided error and how much of the evidence stands at each look (fractions, the last
is 1). Out: the nominal one-sided level of each look. Looking three times at 5 % each would block
11 % of equal candidates; these levels keep the total at what was asked for.

Lan and DeMets' function in the shape of O'Brien and Fleming, alpha(t) = 2 - 2 Phi(z(alpha/2) /
sqrt t): early looks decide only what is plain. The boundaries follow by recursive integration over
a Brownian motion (Armitage, McPherson and Rowe 1969).
"""

from __future__ import annotations

from functools import lru_cache

GRID = 800  # points; the levels are right to 1e-5


@lru_cache(maxsize=256)
def levels(alpha: float, fractions: tuple[float, ...]) -> tuple[float, ...]:
    """Nominal one-sided level of each look.

    Args:
        alpha: total one-sided error.
        fractions: of the evidence at each look, growing; a last one under 1 leaves error unspent.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import ndtr

    if sorted({0.0, *fractions}) != [0.0, *fractions] or not 0 < max(fractions, default=0) <= 1:
        raise ValueError(f"fractions must grow within (0, 1]: {fractions}")
    found: list[float] = []
    spent_before, at, points, weights = 0.0, 0.0, np.zeros(1), np.ones(1)
    for fraction in fractions:
        to_spend = spent(alpha, fraction) - spent_before
        step, root = (fraction - at) ** 0.5, fraction**0.5

        def excess(
            bound: float,
            step: float = step,
            root: float = root,
            points: np.ndarray = points,
            weights: np.ndarray = weights,
            to_spend: float = to_spend,
        ) -> float:
            """Chance to cross at this look for the first time, beyond what may be spent."""
            return float(weights @ ndtr((points - bound * root) / step)) - to_spend

        bound = float(brentq(excess, -8.0, 12.0, xtol=1e-9))
        found.append(float(ndtr(-bound)))
        grid = np.linspace(-8.0 * root, bound * root, GRID + 1)
        away = (grid[:, None] - points[None, :]) / step
        density = np.exp(-(away**2) / 2) / ((2 * np.pi) ** 0.5 * step) @ weights
        simpson = np.ones(GRID + 1)
        simpson[1:-1:2], simpson[2:-1:2] = 4, 2
        points, weights = grid, density * simpson * (grid[1] - grid[0]) / 3
        spent_before, at = spent(alpha, fraction), fraction
    return tuple(found)


def spent(alpha: float, fraction: float) -> float:
    """Error that may be spent once ``fraction`` of the evidence stands."""
    from scipy.special import ndtr, ndtri

    return float(2 * ndtr(ndtri(alpha / 2) / fraction**0.5))
