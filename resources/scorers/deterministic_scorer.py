"""The deterministic metrics as a scorer: words compared with words.

A question whose right answer is known gets the metrics of ``deterministic.METRICS``; live traffic,
where nobody knows whether the documents answer the question, gets those that need no reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from resources.scorers import deterministic
from resources.scorers.scorer import Item, Score, source_version

#: Of an answer to a question that nobody knows the right answer to.
REFUSAL = "refusal"
OF_PASSAGES = {
    "citation_in_context": deterministic.citation_in_context,
    "grounded": deterministic.grounded,
}


class DeterministicScorer:
    """No model, no clock, no randomness."""

    name = "deterministic"

    @cached_property
    def version(self) -> str:
        return source_version(deterministic)

    def applies(self, item: Item) -> list[str]:
        refused = deterministic.is_refusal(item.answer)
        if item.answerable is None:
            return [REFUSAL] if refused else [REFUSAL, *OF_PASSAGES]
        kinds = {"answerable" if item.answerable else "unanswerable"}
        kinds |= set() if refused else {"answered"}
        return [name for name, applies in deterministic.METRICS.items() if applies in kinds]

    def score(self, items: Sequence[Item]) -> list[list[Score]]:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> list[Score]:
        metrics = self.applies(item)
        if item.problem is not None:
            return [self._score(item, metric, None, item.problem) for metric in metrics]
        if item.answerable is None:
            return [self._live(item, metric) for metric in metrics]
        values = deterministic.score_answer(
            item.answer,
            answerable=item.answerable,
            reference=item.reference,
            passages=item.passages,
        )
        return [self._score(item, metric, value) for metric, value in values.items()]

    def _live(self, item: Item, metric: str) -> Score:
        if metric == REFUSAL:
            return self._score(item, metric, float(deterministic.is_refusal(item.answer)))
        if item.lost is not None:
            return self._score(item, metric, None, f"missing: {item.lost}")
        return self._score(item, metric, OF_PASSAGES[metric](item.answer, item.passages))

    def _score(
        self, item: Item, metric: str, value: float | None, reason: str | None = None
    ) -> Score:
        return Score(item.id, metric, value, reason, self.name, self.version)
