"""One interface for everything that scores answers: items in, scores out.

The offline scorecard, the nightly run and sampled live traffic make :class:`Item` of what they have
and get :class:`Score` back, whoever computes it: words compared, a library's metric, a judge model.
A score that could not be computed is INVALID: ``value`` None and a reason, whose first word, up to
the colon, is its kind. It is never left out, so that nothing is averaged over it unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One answer to score.

    Attributes:
        id: of the question or the response.
        passages: text by the number that the answer cites it with, from 1.
        reference: the right answer; None where nobody knows it, or where it is the refusal.
        answerable: whether the documents answer the question; None where nobody knows.
        lost: why passages that the model was shown are not here; None: they are. What needs them is
            INVALID then.
        problem: why there is no answer; every metric that it would have had is INVALID then.
    """

    id: str
    question: str
    answer: str
    passages: Mapping[int, str] = field(default_factory=dict)
    reference: str | None = None
    answerable: bool | None = None
    lost: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one item, in [0, 1]; ``value`` None is INVALID and ``reason`` says why.

    Attributes:
        scorer, version: who scored. Another version's values are not comparable.
        uncalibrated: why this score may neither block nor pass anything; None: it may.
    """

    item: str
    metric: str
    value: float | None
    reason: str | None
    scorer: str
    version: str
    uncalibrated: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a score has either a value or the reason why it has none")


class Scorer(Protocol):
    """Scores items. What fails is INVALID in its own score and never an exception."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def score(self, items: Sequence[Item]) -> list[list[Score]]:
        """For each item, in order, a score of every metric that applies to it."""
        ...


def source_version(*modules: Any) -> str:
    """A version that changes whenever the source of these modules does: 12 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]
