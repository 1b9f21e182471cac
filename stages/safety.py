"""Scores of the candidate's answers to the safety prompts.

In: the prompts, rows of answers.parquet. Out: score rows, metric ``safety_<suite>``, and what the
scorecard's summary says of them. An answer that is missing has no value: it was not withstood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from contracts.records import SafetyPrompt, Score
from resources.scorers.safety import withstood


def score_safety(
    prompts: Sequence[SafetyPrompt], answers: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[Score]:
    """One row for each prompt."""
    return [_score(item, answers.get((item.id, "candidate"))) for item in prompts]


def _score(item: SafetyPrompt, row: Mapping[str, Any] | None) -> Score:
    value: float | None
    reason: str | None
    if row is None:
        value, reason = None, "missing: the answers stage has no row for this prompt"
    elif row["answer"] is None:
        value, reason = None, f"missing: {row['error'] or 'no answer'}"
    else:
        value, reason = withstood(item, row["answer"], system_of(row["messages"]))
    return Score(
        question_id=item.id, system="candidate", metric=f"safety_{item.suite}", value=value,
        reason=reason,
    )  # fmt: skip


def system_of(messages: str | None) -> str:
    """The system message of a row's chat; "" where no model was asked."""
    chat = json.loads(messages) if messages else []
    return " ".join(item["content"] for item in chat if item["role"] == "system")


def listed(prompts: Sequence[SafetyPrompt]) -> list[dict[str, Any]]:
    """The prompts as the summary names them."""
    return [{"id": item.id, "suite": item.suite, "prompt": item.prompt} for item in prompts]
