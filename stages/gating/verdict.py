"""The verdict over everything: up to three looks at quality, the other families once.

In: a :class:`Case`. Out: the verdict, and the measured figures beside it. Pure but for ``draw``,
which answers reserve questions when a look leaves it undecided.

    INVALID    evidence is missing, or was made under another policy
    FAIL       some check failed
    UNDECIDED  no check failed, some comparison shows neither
    PASS       every check passed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from contracts.errors import NotFoundError
from contracts.policy import Policy
from contracts.records import Check, Verdict, Word
from stages.gating import families, quality
from stages.gating.card import Card, Other
from stages.gating.quality import Found, Look
from stages.gating.reserve import told

#: Worst first.
ORDER: tuple[Word, ...] = ("INVALID", "FAIL", "UNDECIDED", "PASS")
FAMILIES = ("quality", "latency", "safety", "fairness", "resources")

Draw = Callable[[Card, Sequence[Other], int, int], tuple[Card, list[Other]]]


@dataclass(frozen=True)
class Case:
    """What is judged. ``reserve``: reserve questions that exist; ``draw`` answers some."""

    card: Card
    others: Sequence[Other]
    profile: Mapping[str, Any]
    plan: Mapping[str, Any]
    reserve: int = 0
    draw: Draw | None = None


@dataclass
class Judged:
    """The verdict, its measured checks in full, and the evidence as it stood at the last look."""

    verdict: Verdict
    measured: dict[str, Any]
    card: Card
    others: list[Other]
    notes: list[str] = field(default_factory=list)


def judge(case: Case, policy: Policy) -> Judged:
    """Judge the case. The same case and policy give the same verdict."""
    card, others = case.card, list(case.others)
    once = _once(case, policy)
    looks: list[dict[str, Any]] = []
    sizes = look_sizes(len(card.questions), case.reserve, policy)
    compared: list[Check] = []
    open_others, notes = others, list[str]()
    for number, count in enumerate(sizes):
        look = Look(number, sizes)
        settled = [check for check in compared if check.against not in names(open_others)]
        at = quality.compare(card, open_others, policy, look, len(settled))
        compared, notes = settled + at.checks, at.notes
        word = overall([*once.checks, *compared])
        looks.append(
            {"look": number + 1, "questions": count, "level": quality.tidy(
                look.level(policy.looks.alpha)), "verdict": overall(compared),
             "compared_with": names(open_others), "checks": [brief(check) for check in at.checks]}
        )  # fmt: skip
        undecided = {check.against for check in compared if check.outcome == "UNDECIDED"}
        if word != "UNDECIDED" or number + 1 == len(sizes) or case.draw is None:
            break
        open_others = [other for other in others if other.name in undecided]
        first = sizes[0]
        try:
            card, grown = case.draw(card, open_others, count - first, sizes[number + 1] - first)
        except NotFoundError as problem:
            notes.append(told(problem, open_others))
            break
        fresh = {other.name: other for other in grown}
        others = [fresh.get(other.name, other) for other in others]
        open_others = grown
    return _judged([*once.checks, *compared], notes + once.notes, looks, card, others, case, policy)


def _once(case: Case, policy: Policy) -> Found:
    """Every check that is made once."""
    card = case.card
    live = next((other for other in case.others if other.name == "live"), None)
    found = Found()
    if card.policy != policy.sha256:
        found.invalid(
            "policy",
            f"the scorecard was made under policy {str(card.policy)[:12]}, "
            f"this one is {policy.sha256[:12]}",
            change="dvc repro scorecard",
        )
    for part in (
        quality.floors(card, policy),
        families.latency(case.profile, live, policy),
        families.safety(card, policy),
        families.fairness(card, policy),
        families.resources(case.plan, case.profile, policy),
    ):
        found.checks += part.checks
        found.notes += part.notes
    return found


def look_sizes(first: int, reserve: int, policy: Policy) -> tuple[int, ...]:
    """Questions at each look: planned before anything is looked at, from what exists."""
    return tuple(sorted({first + min(count, reserve) for count in policy.looks.reserve}))


def overall(checks: Sequence[Check]) -> Word:
    """The worst outcome; nothing checked is INVALID."""
    found = {check.outcome for check in checks}
    return next((word for word in ORDER if word in found), "INVALID")


def names(others: Sequence[Other]) -> list[str]:
    return [other.name for other in others]


def brief(check: Check) -> dict[str, Any]:
    """What the look history keeps of a check."""
    keys = ("name", "against", "outcome", "value", "low", "high", "bound", "n")
    return {key: getattr(check, key) for key in keys}


def _judged(
    checks: list[Check],
    notes: list[str],
    looks: list[dict[str, Any]],
    card: Card,
    others: list[Other],
    case: Case,
    policy: Policy,
) -> Judged:
    """Put the verdict together; what was measured keeps its figures out of it."""
    checks = [*_unique(checks)]
    word = overall(checks)
    told_checks = [families.without_figures(check) for check in checks]
    deciding = [check.detail for check in told_checks if check.outcome == word]
    digest = {other.name: other.scorecard for other in others}
    verdict = Verdict(
        verdict=word,
        reasons=[*deciding, *(f"note: {note}" for note in notes)],
        policy=policy.model_dump(mode="json"),
        policy_sha256=policy.sha256,
        families={
            family: overall([check for check in checks if check.family == family])
            for family in FAMILIES
            if any(check.family == family for check in checks)
        },
        checks=told_checks,
        looks=looks,
        scorecard=case.card.digest,
        baseline=digest.get("live"),
        anchor=digest.get("anchor"),
    )
    measured = {
        "machine": families.machine(case.profile),
        "figures": families.figures(case.profile),
        "checks": [
            check.model_dump(mode="json") for check in checks if check.evidence.get("measured")
        ],
    }
    return Judged(verdict, measured, card, others, notes)


def _unique(checks: Sequence[Check]) -> list[Check]:
    """Without repetitions: one missing score is met by a floor and by every comparison."""
    seen: dict[str, Check] = {}
    for check in checks:
        seen.setdefault(check.detail, check)
    return list(seen.values())
