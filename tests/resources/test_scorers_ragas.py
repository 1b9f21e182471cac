"""resources.scorers.ragas_scorer: ragas' new metrics, what they fail with, and whom they ask."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.judge_server import JudgeServer
from contracts.errors import ConfigError
from contracts.records import REFUSAL
from resources.judging.judge import Endpoint
from resources.scorers.ragas_scorer import MODEL, WORDS, RagasScorer, closed, guarded
from resources.scorers.scorer import Item, Score

ITEM = Item("q1", "How?", "It is so. [1]", {1: "It is so."}, reference="It is so.", answerable=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "not a score"),
        (math.inf, "not a score"),
        (1.5, "not a score"),
        (-0.2, "not a score"),
        ("word", "ValueError"),
        (None, "TypeError"),
        (ImportError("rapidfuzz is required"), "rapidfuzz is required"),
    ],
)
def test_what_a_foreign_metric_returns_is_not_trusted(value: Any, reason: str) -> None:
    async def metric(item: Item) -> Any:
        if isinstance(value, Exception):
            raise value
        return SimpleNamespace(value=value)

    found, why = asyncio.run(guarded(metric, ITEM))
    assert found is None and reason in (why or "")


def test_an_unknown_metric_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean rouge_score"):
        RagasScorer(["rogue_score"])
    with pytest.raises(ConfigError, match="faithfulness of ragas ask a model"):
        RagasScorer(["rouge_score", "faithfulness"])
    with pytest.raises(ConfigError, match="answer_relevancy compares embeddings"):
        RagasScorer(["answer_relevancy"], Endpoint("http://127.0.0.1:1", "m"))


def test_only_answers_with_a_reference_are_scored_and_a_missing_one_is_invalid() -> None:
    scorer = RagasScorer(list(WORDS))
    items = [replace(ITEM, answerable=False, reference=None), replace(ITEM, reference=None)]
    assert scorer.score(items) == [[], []]
    assert scorer.applies(replace(ITEM, problem="gone")) == list(WORDS)


def test_strict_servers_get_closed_schemas() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/In"}, "c": {"type": "string"}},
        "required": ["a"],
        "$defs": {"In": inner},
    }
    found = closed(schema)
    assert found["required"] == ["a", "c"] and found["additionalProperties"] is False
    assert found["$defs"]["In"]["required"] == ["b"]
    assert "required" not in inner  # the caller's own is left alone


#: What a model answers that finds half of everything: by the fields that ragas asks for.
HALF: dict[str, Callable[[], Any]] = {
    "statements": lambda: {"statements": ["It is so.", "It is not."]},
    "classifications": lambda: {
        "classifications": [
            {"statement": text, "reason": "r", "attributed": n} for n, text in enumerate("ab")
        ]
    },
    "claims": lambda: {"claims": ["It is so.", "It is not."]},
    "question": lambda: {"question": "How?", "noncommittal": 0},
    "verdict": lambda: {"reason": "r", "verdict": 1},
}


def half(shown: Mapping[str, Any]) -> dict[str, Any]:
    fields = shown["properties"]
    if "statements" in fields and "$ref" in str(fields["statements"]):  # statements to judge
        rows = [{"statement": t, "reason": "r", "verdict": n} for n, t in enumerate(("no", "yes"))]
        return {"statements": rows}
    (name,) = [name for name in HALF if name in fields]
    found: dict[str, Any] = HALF[name]()
    return found


def embed(texts: Sequence[str]) -> list[list[float]]:
    return [[1.0, 0.0] if text == "How?" else [0.0, 1.0] for text in texts]


def score(answer: Any, names: Sequence[str], item: Item = ITEM, **more: Any) -> dict[str, Score]:
    with JudgeServer(answer) as server:
        endpoint = Endpoint(server.url, "m", deadline=more.pop("deadline", 5.0), key="sk-ragas")
        scorer = RagasScorer(names, endpoint, more.pop("caches", None), embed)
        (found,) = scorer.score([item])
    more.setdefault("bodies", []).extend(server.bodies)
    return {item.metric: item for item in found}


@pytest.mark.slow
def test_metrics_that_ask_a_model(tmp_path: Path) -> None:
    """Each through HTTP and ragas' own prompts; a refusal and a broken model without them."""
    bodies: list[dict[str, Any]] = []
    found = score(half, list(MODEL), caches=tmp_path, bodies=bodies)
    values = {name: item.value for name, item in found.items()}
    assert values == {
        "faithfulness": 0.5,
        "answer_relevancy": 1.0,
        "context_precision": 1.0,
        "context_recall": 0.5,
        "factual_correctness": 0.5,
    }, {name: item.reason for name, item in found.items()}
    assert all("not calibrated" in (item.uncalibrated or "") for item in found.values())
    assert {body["temperature"] for body in bodies} == {0} and len(bodies) >= 6
    assert all(body["response_format"]["json_schema"]["strict"] for body in bodies)

    again: list[dict[str, Any]] = []
    cached = score("hang", list(MODEL), caches=tmp_path, bodies=again)
    assert not again and {name: item.value for name, item in cached.items()} == values

    refused = score(half, list(MODEL), replace(ITEM, answer=REFUSAL), bodies=again)
    assert not again and {item.value for item in refused.values()} == {0.0}

    for fault, kind in (("garbage", "wrong_form"), ("refusal", "refused"), ("hang", "timeout")):
        broken = score(lambda _, fault=fault: fault, list(MODEL), deadline=0.2)
        assert {item.value for item in broken.values()} == {None}
        assert {(item.reason or "").split(":")[0] for item in broken.values()} == {kind}
