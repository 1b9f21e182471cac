"""More evidence: reserve questions, answered now by every system that the look compares.

In: a slice of ``examples/reserve.jsonl``, in its fixed order, and where each system's model, index
and prompt stand. Out: score rows, made by the code that made the scorecard.

The candidate answers from its bundle, the weights that will be served; the live release and the
anchor from their installed copies, which hold the same of theirs. A release is immutable and
decoding is greedy, so one question always gets one answer, and the verdict stays a function of what
the gate is given. The base model has no bundle and answers from its own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracts.errors import NotFoundError
from contracts.params import Params
from contracts.policy import Opponent
from contracts.records import Example, Score
from contracts.settings import Settings
from stages import answers, harness, scorecard
from stages.gating.card import Card, Other, by_metric


@dataclass(frozen=True)
class Sources:
    """What one system answers from."""

    model: Path
    index: Path
    prompts: Path
    params: Params


class Reserve:
    """Draws reserve questions. Raises NotFoundError where a release is not installed here.

    Args:
        paths: of the gate stage.
        examples: the reserve, in order.
    """

    def __init__(self, paths: Any, params: Params, examples: Sequence[Example]) -> None:
        self.paths, self.params, self.examples = paths, params, examples
        self.rows: list[Score] = []

    def sources(self, other: Other | None) -> Sources:
        """Where ``other`` answers from; None is the candidate."""
        paths = self.paths
        here = Sources(paths.bundle / "checkpoint", paths.index, paths.prompts, self.params)
        if other is None:
            return here
        if other.release is None:
            return replace(here, model=paths.base_model)
        from resources.releases import verify

        found = verify(Settings.from_env(), other.release)
        blocks = {"answers": found.answers, "vectors": found.vectors}
        return Sources(
            found.bundle / "checkpoint",
            found.index,
            found.path / "prompts.json",
            self.params.model_copy(update=blocks),
        )

    def draw(
        self, card: Card, others: Sequence[Other], start: int, stop: int
    ) -> tuple[Card, list[Other]]:
        """Card and others with the scores of reserve questions ``start`` to ``stop`` added."""
        places = {other.name: self.sources(other) for other in others}  # before anything slow
        asked = self.examples[start:stop]
        scorers = scorecard.scorers_of(self.params, self.paths.judges)
        harness.progress(f"gate: undecided, asking reserve questions {start + 1} to {stop}")
        mine = self._score("candidate", self.sources(None), asked, scorers)
        extra = {other.name: self._score(other.name, places[other.name], asked, scorers)
                 for other in others}  # fmt: skip
        card = replace(
            card,
            questions=card.questions | {e.id: scorecard.question_of(e) for e in asked},
            candidate=merged(card.candidate, by_metric(mine, "candidate")),
            base=merged(card.base, by_metric(extra.get("base", []), "base")),
        )
        return card, [
            replace(other, scores=merged(other.scores, by_metric(extra[other.name], other.name)))
            for other in others
        ]

    def _score(
        self,
        system: Opponent | str,
        source: Sources,
        asked: Sequence[Example],
        scorers: Sequence[Any],
    ) -> list[Score]:
        """Answer and score ``asked``; the rows are kept for data/gate as well."""
        shown, prompts = answers.render(asked, source.index, source.prompts, source.params)
        model = answers.Systems(source.model)
        given = model.answer(
            "candidate", prompts, max_tokens=source.params.answers.max_tokens, label=system
        )
        rows = {
            (example.id, "candidate"): answers.row(example, "candidate", passages, prompt, answer)
            for example, passages, prompt, answer in zip(asked, shown, prompts, given, strict=True)
        }
        scores, _ = scorecard.score_all(asked, rows, scorers, systems=("candidate",))
        named = [row.model_copy(update={"system": system}) for row in scores]
        self.rows += named
        return named


def merged(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Scores of both, metric by metric."""
    names = {**first, **second}
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in names}


def told(problem: NotFoundError, others: Sequence[Other]) -> str:
    """Why no more could be drawn, as a note."""
    releases = ", ".join(f"{other.release} ({other.name})" for other in others if other.release)
    return (
        f"no reserve question could be drawn: {problem.what} To answer them, {releases} must be "
        "installed here (python -m serving.deploy up), so this stays UNDECIDED"
    )
