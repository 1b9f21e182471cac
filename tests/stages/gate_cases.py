"""Cases for the gate: cards of plain numbers, a profile, a memory plan, a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.policy import Policy, load_policy
from contracts.records import Check, Example, SafetyPrompt, Score, Verdict
from contracts.settings import ROOT
from stages.gating.card import Card, Other, Scores, card_of
from stages.gating.verdict import Case, judge
from stages.safety import listed
from stages.scorecard import summarise

Numbers = Mapping[tuple[str, str], Mapping[str, float | None]]  # (system, metric) -> id -> value
SUITES = ("injection", "leakage", "refusal")


def prompts(each: int = 24) -> list[SafetyPrompt]:
    return [
        SafetyPrompt(id=f"{suite}-{at:02d}", suite=suite, prompt="Well?")  # type: ignore[arg-type]
        for suite in SUITES
        for at in range(each)
    ]


def rows_of(numbers: Numbers) -> list[Score]:
    return [
        Score(question_id=name, system=system, metric=metric, value=value)  # type: ignore[arg-type]
        for (system, metric), values in numbers.items()
        for name, value in values.items()
    ]


def withstood(**failed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Safety scores; so many prompts of a suite fail."""
    return {
        ("candidate", f"safety_{suite}"): {
            item.id: float(at >= failed.get(suite, 0))
            for at, item in enumerate(item for item in prompts() if item.suite == suite)
        }
        for suite in SUITES
    }


def card(asked: Sequence[Example], numbers: Numbers, **changes: Any) -> Card:
    """A gate's card from numbers, through the scorecard's own summary; safety withstood."""
    golden = rows_of(numbers)
    safety = rows_of(changes.pop("safety", withstood()))
    summary = summarise(golden, list(asked), safety)
    summary |= {"policy": policy().sha256, "safety": listed(prompts())} | changes
    return card_of([*golden, *safety], summary, "c" * 32 + ".dir")


def perfect(
    asked: Sequence[Example], value: float = 0.9, base: float = 0.3
) -> dict[tuple[str, str], Any]:
    """Numbers of a candidate that passes ``policy()`` and of a base that is worse."""
    answerable = [item.id for item in asked if item.answerable]
    rest = [item.id for item in asked if not item.answerable]
    numbers: dict[tuple[str, str], Any] = {}
    for system, level in (("candidate", value), ("base", base)):
        numbers[system, "answer_overlap"] = dict.fromkeys(answerable, level)
        numbers[system, "exact_match"] = dict.fromkeys(answerable, float(level > 0.5))
        numbers[system, "citation_in_context"] = dict.fromkeys(answerable, level)
        numbers[system, "false_refusal"] = dict.fromkeys(answerable, 0.0)
        numbers[system, "refusal_on_unanswerable"] = dict.fromkeys(rest, 1.0)
    return numbers


def policy(**changes: Any) -> Policy:
    """The repository's policy with few resamples, one look and higher floors."""
    content = load_policy(ROOT / "data" / "policies" / "gate.yaml").model_dump(mode="json")
    content |= {"resamples": 1000, "looks": {"alpha": 0.05, "reserve": [0]}}
    content["quality"]["floors"] = [
        {"metric": "answer_overlap", "min": 0.5},
        {"metric": "citation_in_context", "min": 0.8},
        {"metric": "refusal_on_unanswerable", "min": 0.5},
    ]
    return Policy.model_validate(content | changes)


def profile(**mixed: float) -> dict[str, Any]:
    """Figures of a profile that is well within the policy."""
    samples = [100.0 + at for at in range(32)]
    return {
        "machine": {"kind": "Test CPU", "cpus": 2},
        "vllm": {
            "peak_bytes": 3 << 30,
            "mixed": {
                "ttft_ms": {"p50": 115.0, "p95": 130.0},
                "tpot_ms": {"p50": 10.0, "p95": 20.0},
                "tokens_per_s": 200.0,
                "samples_ms": {"ttft": samples, "tpot": samples},
            }
            | mixed,
        },
        "ratio": {"mixed": 2.5},
    }


PLAN = {"total_bytes": 3 << 30, "budget_bytes": 8 << 30}


def release(scores: Scores, name: str = "live", **changes: Any) -> Other:
    """A release to compare with."""
    given = {"release": "0123456789abcdef", "scorecard": "f" * 32 + ".dir"} | changes
    return Other(name, scores, **given)  # type: ignore[arg-type]


def verdict(found: Card, *others: Other, **changes: Any) -> Verdict:
    """The verdict over a card, with the base model and ``others`` to compare with."""
    rules = changes.pop("policy", policy())
    given = {"profile": profile(), "plan": PLAN} | changes
    return judge(Case(found, [Other("base", found.base), *others], **given), rules).verdict


def check(found: Verdict, name: str, against: str | None = None, kind: str | None = None) -> Check:
    (one,) = [
        item
        for item in found.checks
        if item.name == name and item.against == against and (kind is None or item.kind == kind)
    ]
    return one
