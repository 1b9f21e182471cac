"""A judge model as a scorer: each criterion of the rubric is a metric, ``judge_<criterion>``.

A refusal is not shown to the judge: of a question that the documents answer it scores 0 (whoever
refuses everything must not look good), of any other it has no score here. Scores of a judge that
nobody has calibrated under this version, or that did not agree with people, carry the reason in
``uncalibrated``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from contracts.params import Judge as JudgeParams
from contracts.settings import Settings
from resources.judging import rubric
from resources.judging.calibration import Calibration, read_store, uncalibrated
from resources.judging.judge import (
    Endpoint,
    Invalid,
    Judge,
    cache_folder,
    endpoint_of,
    judged,
)
from resources.scorers.deterministic import is_refusal
from resources.scorers.scorer import Item, Score


class JudgeScorer:
    """Blocks while it asks; not for a thread that runs an event loop.

    Args:
        criteria: of ``rubric.CRITERIA``.
        calibrations: by version.
        floor: of kappa, by the policy.
        caches: folder of the judge's answers; None keeps none.
    """

    name = "judge"

    def __init__(
        self,
        endpoint: Endpoint,
        criteria: Sequence[str],
        calibrations: Mapping[str, Calibration],
        floor: float,
        caches: Path | None,
    ) -> None:
        self._endpoint, self._criteria, self._floor = endpoint, criteria, floor
        self._calibrations, self._caches = calibrations, caches

    @classmethod
    def of(cls, judge: JudgeParams, calibrations: Path, settings: Settings) -> JudgeScorer:
        """The judge of params.yaml. Raises ConfigError without JUDGE_URL."""
        return cls(
            endpoint_of(judge.model, settings),
            judge.criteria,
            read_store(calibrations),
            judge.min_kappa,
            cache_folder(settings),
        )

    @property
    def version(self) -> str:
        return "+".join(self._version(name) for name in self._criteria)

    def calibration(self, metric: str) -> Calibration | None:
        """What is known of the judge behind ``judge_<criterion>``."""
        return self._calibrations.get(self._version(metric.removeprefix("judge_")))

    def doubts(self) -> dict[str, str | None]:
        """Metric -> why it may decide nothing, before anything is asked; None: it may."""
        metrics = [f"judge_{name}" for name in self._criteria]
        return {name: uncalibrated(self.calibration(name), self._floor) for name in metrics}

    def applies(self, item: Item) -> list[str]:
        if is_refusal(item.answer) and not item.answerable:
            return []
        return [f"judge_{name}" for name in self._criteria if rubric.applies(name, item)]

    def score(self, items: Sequence[Item]) -> list[list[Score]]:
        async def work(judge: Judge) -> list[list[Score]]:
            return await asyncio.gather(*(self._item(judge, item) for item in items))

        return judged(self._endpoint, self._caches, work)

    async def _item(self, judge: Judge, item: Item) -> list[Score]:
        names = [metric.removeprefix("judge_") for metric in self.applies(item)]
        return await asyncio.gather(*(self._one(judge, name, item) for name in names))

    async def _one(self, judge: Judge, criterion: str, item: Item) -> Score:
        if item.problem is not None:
            return self._score(item, criterion, None, item.problem)
        if is_refusal(item.answer):
            return self._score(item, criterion, 0.0)
        if item.lost is not None and rubric.NEEDS.get(criterion) == "passages":
            return self._score(item, criterion, None, f"missing: {item.lost}")
        try:
            found = await rubric.grade(judge, criterion, item)
        except Invalid as problem:
            return self._score(item, criterion, None, str(problem))
        value = rubric.unit(found.fields["score"])
        return self._score(item, criterion, value, served=[found.served])

    def _score(
        self,
        item: Item,
        criterion: str,
        value: float | None,
        reason: str | None = None,
        served: Sequence[str] = (),
    ) -> Score:
        version = self._version(criterion)
        doubt = uncalibrated(self._calibrations.get(version), self._floor, served)
        return Score(item.id, f"judge_{criterion}", value, reason, self.name, version, doubt)

    def _version(self, criterion: str) -> str:
        return rubric.form(criterion).version(self._endpoint.model)
