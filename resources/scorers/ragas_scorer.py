"""Metrics of ragas 0.4.3, by its new API alone (``ragas.metrics.collections``).

Its old ``evaluate()`` is not used: it turns failures into NaN and drops them from the mean
(ragas#3028). The new one raises, and has no limit of its own: here each metric is one call, what it
raises and what is no number in [0, 1] is INVALID, and how many are under way at once is the judge's
limit. Metrics that ask a model do it through ``resources.judging`` instead of ragas' own clients:
deadlines, retries and the cache are the same. Nobody calibrates these prompts, so their scores
decide nothing.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from resources.judging.client import Endpoint, Invalid
from resources.judging.forms import Form
from resources.judging.judge import Judge, judged
from resources.scorers.deterministic import is_refusal, unmarked
from resources.scorers.scorer import Item, Score

#: Need neither model nor embeddings; all are of (reference, response).
WORDS = {
    "rouge_score": "RougeScore",
    "bleu_score": "BleuScore",
    "chrf_score": "CHRFScore",
    "non_llm_string_similarity": "NonLLMStringSimilarity",
    "string_presence": "StringPresence",
}
#: Ask a model: ragas' class, and the fields that it is given.
MODEL = {
    "faithfulness": ("Faithfulness", ("user_input", "response", "retrieved_contexts")),
    "answer_relevancy": ("AnswerRelevancy", ("user_input", "response")),
    "context_precision": ("ContextPrecision", ("user_input", "reference", "retrieved_contexts")),
    "context_recall": ("ContextRecall", ("user_input", "retrieved_contexts", "reference")),
    "factual_correctness": ("FactualCorrectness", ("response", "reference")),
}
KNOWN = (*WORDS, *MODEL)
UNCALIBRATED = "ragas' prompts are not calibrated against people's labels"
#: Lists of claims are longer than a verdict.
MAX_TOKENS = 2048

Texts = Sequence[str]
Embed = Callable[[Texts], Sequence[Sequence[float]]]
Metric = Callable[[Item], Awaitable[Any]]


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for names that are not :data:`KNOWN`, each with its nearest neighbour."""
    unknown = [name for name in names if name not in KNOWN]
    if not unknown:
        return
    near = [
        f"{name}; did you mean {m[0]}?"
        if (m := difflib.get_close_matches(name, KNOWN, 1))
        else name
        for name in unknown
    ]
    raise ConfigError(
        "scorecard.ragas names metrics that are not known here.",
        offenders=near,
        where="params.yaml",
        next=f"known: {', '.join(KNOWN)}",
    )


class RagasScorer:
    """Scores of answers to questions whose right answer is known.

    Args:
        names: of :data:`KNOWN`. Importing ragas costs 7 CPU seconds, at the first score.
        endpoint: of the model; needed for a name of :data:`MODEL`.
        caches: folder of the model's answers; None keeps none.
        embed: texts to vectors; needed for ``answer_relevancy``.

    Raises:
        ConfigError: an unknown name, or one without what it needs.
    """

    name = "ragas"

    def __init__(
        self,
        names: Sequence[str],
        endpoint: Endpoint | None = None,
        caches: Path | None = None,
        embed: Embed | None = None,
    ) -> None:
        check_names(names)
        asking = [name for name in names if name in MODEL]
        if asking and endpoint is None:
            raise ConfigError(
                f"{', '.join(asking)} of ragas ask a model, and none is configured.",
                where="params.yaml: scorecard.ragas",
                next="set scorecard.judge and JUDGE_URL",
            )
        if "answer_relevancy" in asking and embed is None:
            raise ConfigError(
                "answer_relevancy compares embeddings, and there is no embedding model.",
                where="params.yaml: scorecard.ragas",
            )
        self._names, self._endpoint, self._caches, self._embed = names, endpoint, caches, embed

    @cached_property
    def version(self) -> str:
        return version("ragas")

    def applies(self, item: Item) -> list[str]:
        return list(self._names) if item.answerable and item.reference else []

    def score(self, items: Sequence[Item]) -> list[list[Score]]:
        if not any(self.applies(item) for item in items):
            return [[] for _ in items]
        if self._endpoint is None:
            return asyncio.run(self._all(items, None))
        return judged(self._endpoint, self._caches, lambda judge: self._all(items, judge))

    async def _all(self, items: Sequence[Item], judge: Judge | None) -> list[list[Score]]:
        metrics = {name: self._metric(name, judge) for name in self._names}
        return await asyncio.gather(*(self._item(metrics, item) for item in items))

    async def _item(self, metrics: Mapping[str, Metric], item: Item) -> list[Score]:
        return [await self._one(name, metrics[name], item) for name in self.applies(item)]

    async def _one(self, name: str, metric: Metric, item: Item) -> Score:
        value, reason = 0.0 if item.problem is None else None, item.problem
        if item.problem is None and (name in WORDS or not is_refusal(item.answer)):
            value, reason = await guarded(metric, item)
        doubt = UNCALIBRATED if name in MODEL else None
        return Score(item.id, name, value, reason, self.name, self._version_of(name), doubt)

    def _version_of(self, name: str) -> str:
        if name in WORDS or self._endpoint is None:
            return self.version
        return f"{self.version} {self._endpoint.model}"

    def _metric(self, name: str, judge: Judge | None) -> Metric:
        from ragas.metrics import collections

        if name in WORDS:
            words = getattr(collections, WORDS[name])()
            # Marks like "[2]" are no part of the sentence that it compares.
            return lambda item: words.ascore(
                reference=item.reference, response=unmarked(item.answer)
            )
        assert judge is not None, "checked when it was made"
        kind, fields = MODEL[name]
        given: dict[str, Any] = {"llm": model_of(judge, f"ragas_{name}", self.version)}
        if name == "answer_relevancy":  # greedy answers are all the same: one is enough
            assert self._embed is not None, "checked when it was made"
            given |= {"embeddings": embeddings_of(self._embed), "strictness": 1}
        asking = getattr(collections, kind)(**given)
        return lambda item: asking.ascore(**{field: _FIELDS[field](item) for field in fields})


_FIELDS: dict[str, Callable[[Item], Any]] = {
    "user_input": lambda item: item.question,
    "response": lambda item: unmarked(item.answer),
    "reference": lambda item: item.reference,
    "retrieved_contexts": lambda item: list(item.passages.values()),
}


async def guarded(metric: Metric, item: Item) -> tuple[float | None, str | None]:
    """One foreign metric's value, or None and why: it raised, or gave no number in [0, 1]."""
    try:
        value = float((await metric(item)).value)
    except Invalid as problem:
        return None, str(problem)
    except Exception as error:  # a foreign library may raise anything; the reason is kept
        return None, f"{type(error).__name__}: {error}"
    if not math.isfinite(value) or not -1e-9 <= value <= 1 + 1e-9:
        return None, f"out_of_range: {value!r} is not a score between 0 and 1"
    return round(min(1.0, max(0.0, value)), 9), None


def model_of(judge: Judge, name: str, release: str) -> Any:
    """``judge`` as the model that ragas' new metrics take. ``release``: of ragas, for the cache."""
    from ragas.llms.base import InstructorBaseRagasLLM

    class Model(InstructorBaseRagasLLM):  # type: ignore[misc]
        def generate(self, prompt: str, response_model: Any) -> Any:
            raise NotImplementedError("the metrics of ragas.metrics.collections are asynchronous")

        async def agenerate(self, prompt: str, response_model: Any) -> Any:
            def read(text: str) -> dict[str, Any]:
                try:
                    value = response_model.model_validate_json(text)
                except ValueError:
                    raise Invalid("wrong_form", "not what ragas asked for") from None
                return {"value": value}

            schema = closed(response_model.model_json_schema())
            form = Form(name, "", (release,), schema, read, MAX_TOKENS)
            found = await judge.ask(form, [{"role": "user", "content": prompt}])
            return found.fields["value"]

    return Model()


def embeddings_of(embed: Embed) -> Any:
    """``embed`` as the embedding model that ragas' new metrics take."""
    from ragas.embeddings.base import BaseRagasEmbedding

    class Embeddings(BaseRagasEmbedding):  # type: ignore[misc]
        def embed_text(self, text: str, **_: Any) -> list[float]:
            return [float(value) for value in embed([text])[0]]

        async def aembed_text(self, text: str, **_: Any) -> list[float]:
            return self.embed_text(text)

    return Embeddings()


def closed(schema: Any) -> Any:
    """A JSON schema whose objects have all their properties and no other, as strict servers ask."""
    value = json.loads(json.dumps(schema))

    def close(part: Any) -> None:
        for inner in part.values() if isinstance(part, dict) else part:
            if isinstance(inner, dict | list):
                close(inner)
        if isinstance(part, dict) and part.get("type") == "object" and "properties" in part:
            part["required"] = list(part["properties"])
            part["additionalProperties"] = False

    close(value)
    return value
