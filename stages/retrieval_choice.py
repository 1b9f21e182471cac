"""Dense, sparse or fused: chosen on the dev questions, confirmed on the test questions.

In: how one set of questions fared under several ways of searching (arms). Out: which way dev
chooses, and whether test bears it out.

Fusing two rankings helps on one corpus and harms on another (nDCG +.039 and -.048 on two public
sets), so it is a measured choice in which dense alone is legal, and is preferred: it needs no
second index. An arm may replace it only when its mean paired difference in nDCG@10 to dense on dev
is above zero with 95 % confidence *for all arms at once*, because the best of many arms looks good
by chance (a single-step max-t bootstrap over documents). Of those arms the one with the highest
mean is chosen; where there is none, dense is. Test then judges one comparison, the chosen arm (or,
where that is dense, the best of the others) against dense, and nothing is tuned on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contracts.params import FusedGrid, Search
from stages.retrieval_metrics import Interval, Result, resampled_means, scores

METRIC = "ndcg_at_10"
DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class Difference:
    """Mean paired difference in :data:`METRIC` to dense search, with its interval."""

    mean: float
    interval: Interval

    @property
    def better(self) -> bool:
        return self.interval is not None and self.interval[0] > 0

    def __str__(self) -> str:
        span = f" ({self.interval[0]:+.3f} to {self.interval[1]:+.3f})" if self.interval else ""
        return f"{self.mean:+.3f}{span}"


@dataclass(frozen=True)
class Choice:
    """What dev says, what test adds, and whether the index searches that way."""

    own: str  # the arm that the index is set to
    chosen: str  # the best arm that is better than dense beyond doubt, else dense
    rival: str  # the best arm of dev but dense; the chosen one where that is not dense
    dev: dict[str, Difference]  # every arm but dense; intervals hold for all at once
    test: Difference | None  # the rival against dense; None without test questions
    confirmed: bool | None  # whether test bears the choice out; None as above

    @property
    def agrees(self) -> bool:
        return self.own == self.chosen

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "metric": METRIC, "agrees": self.agrees}


def make_arms(setting: Search, grid: FusedGrid) -> dict[str, Search]:
    """Every way of searching that is tried, by name; dense first, the index's own among them."""
    fused = [
        setting.model_copy(update={"mode": "fused", "rrf_k": rrf_k, "weights": weights})
        for rrf_k in grid.rrf_k
        for weights in grid.weights
    ]
    tried = [
        setting.model_copy(update={"mode": DENSE}),
        setting.model_copy(update={"mode": SPARSE}),
    ]
    return {arm_name(item): item for item in (*tried, *fused, setting)}


def arm_name(search: Search) -> str:
    """ "dense", "sparse" or e.g. "fused 1:0.5, k 60" (dense weight : sparse weight, RRF's k)."""
    if search.mode != "fused":
        return search.mode
    dense, sparse = search.weights
    return f"fused {dense:g}:{sparse:g}, k {search.rrf_k}"


def choose(
    dev: Mapping[str, Sequence[Result]], test: Mapping[str, Sequence[Result]], own: str
) -> Choice:
    """The choice among arms whose results stand in the same order of questions."""
    differences = simultaneous(dev)
    ranked = sorted(differences, key=lambda name: -differences[name].mean)
    chosen = next((name for name in ranked if differences[name].better), DENSE)
    rival = ranked[0] if chosen == DENSE else chosen
    verdict = simultaneous({DENSE: test[DENSE], rival: test[rival]}).get(rival)
    confirmed = None
    if verdict is not None:
        confirmed = not verdict.better if chosen == DENSE else verdict.better
    return Choice(own, chosen, rival, differences, verdict, confirmed)


def simultaneous(arms: Mapping[str, Sequence[Result]]) -> dict[str, Difference]:
    """Differences of each arm to dense; their 95 % intervals hold for all of them together."""
    import numpy as np

    names = [name for name in arms if name != DENSE]
    base = _values(arms[DENSE])
    documents = [str(item.question.document) for item in arms[DENSE] if item.question.answerable]
    if not names or not documents:
        return {}
    values = np.array([_values(arms[name]) for name in names]).T - np.array(base)[:, None]
    means = values.mean(axis=0)
    drawn = resampled_means(values, documents)
    if drawn is None:
        return {name: Difference(_six(mean), None) for name, mean in zip(names, means, strict=True)}
    spread = drawn.std(axis=0)
    distance = np.abs(drawn - means) / np.where(spread > 0, spread, 1.0)
    reach = spread * np.percentile(distance.max(axis=1), 95)
    return {
        name: Difference(_six(mean), (_six(mean - half), _six(mean + half)))
        for name, mean, half in zip(names, means, reach, strict=True)
    }


def _values(results: Sequence[Result]) -> list[float]:
    return [scores(item, [])[METRIC] for item in results if item.question.answerable]


def _six(value: float) -> float:
    return round(float(value), 6)
