"""The quality family: floors of means, and every blocking metric against every other system.

In: a card, the systems to compare with, the policy, which look this is. Out: checks and notes.

    FAIL       shown to be worse than one of them, Holm over all comparisons made
    PASS       a loss beyond the margin is excluded in every comparison
    UNDECIDED  neither; the next look has more questions

A comparison must reach its verdict at the level that its look may spend (``gating.spending``). To
pass, every comparison has to, so passing needs no correction for their number (intersection-union).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from contracts.policy import Blocking, Policy
from contracts.records import Check, Word
from resources.scorers import deterministic as scoring
from stages import statistics
from stages.gating import paired, spending
from stages.gating.card import Card, Other, Scores, Values


@dataclass
class Found:
    """Checks of one family, and what a reader should know beside them."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def invalid(self, name: str, detail: str, family: str = "quality", **more: Any) -> None:
        self.checks.append(
            Check(family=family, name=name, outcome="INVALID", detail=detail, **more)
        )


@dataclass(frozen=True)
class Look:
    """One look: which, out of how many, and how many questions stand at each."""

    number: int  # from 0
    sizes: tuple[int, ...]  # questions in all, at each planned look

    @property
    def fractions(self) -> tuple[float, ...]:
        return tuple(count / self.sizes[-1] for count in self.sizes)

    def level(self, alpha: float) -> float:
        """The nominal one-sided level of this look where all looks may spend ``alpha``."""
        return spending.levels(alpha, self.fractions)[self.number]


@dataclass(frozen=True)
class Asked:
    """One comparison that can be made."""

    metric: Blocking
    other: Other
    result: paired.Comparison
    n: int
    documents: int
    changed: int
    invalid_share: float


def floors(card: Card, policy: Policy) -> Found:
    """The candidate's means against their floors, on the questions that the card has. Pure."""
    found = Found()
    for floor in policy.quality.floors:
        _floor(card, floor.metric, floor.min, policy, found)
    return found


def compare(
    card: Card, others: Sequence[Other], policy: Policy, look: Look, settled: int = 0
) -> Found:
    """Every blocking metric against every system of ``others`` at one look. Pure.

    ``settled`` comparisons were decided at an earlier look; they still count for Holm.
    """
    found = Found()
    asked = [
        item
        for metric in policy.quality.blocking
        for other in others
        if (item := _pairs(card, metric, other, policy, found)) is not None
    ]
    worse = paired.holm(
        {(item.metric.metric, item.other.name): item.result.p_worse() for item in asked},
        lambda count: look.level(policy.looks.alpha / (count + settled)),
    )
    for item in asked:
        _compared(item, (item.metric.metric, item.other.name) in worse, policy, look, found)
    return found


def complete(
    card: Card, scores: Scores, system: str, metric: str, policy: Policy, found: Found
) -> Values | None:
    """Values of a deterministic metric, after asking whether all are there.

    Up to the share ``max_missing`` may be missing; those count as the worst value, so that a
    failure can never raise a mean. None: reported as INVALID.
    """
    name = f"{system} {metric}"
    expected = card.expected(scores, metric)
    applies = scoring.METRICS.get(metric)
    if (system, metric) not in card.known and (expected or applies is None):
        found.invalid(metric, f"{name}: the scorecard has no such metric")
        return None
    if not expected and applies != "answered":
        found.invalid(metric, f"{name}: no question is of the kind that it applies to")
        return None
    mine = scores.get(metric, {})
    missing = [question for question in expected if question not in mine]
    if len(missing) > policy.coverage.max_missing * len(expected):
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        found.invalid(
            metric,
            f"{name}: {len(missing)} of {len(expected)} scores are missing "
            f"(at most {policy.coverage.max_missing:.1%} may be): {shown}",
        )
        return None
    return {question: mine.get(question, worst(metric)) for question in expected}


def worst(metric: str) -> float:
    """The value that nobody wants."""
    return 1.0 if metric in scoring.LOWER_IS_BETTER else 0.0


def _floor(card: Card, metric: str, bound: float, policy: Policy, found: Found) -> None:
    """One floor: the candidate's mean at or above ``bound``, on the questions of the first look."""
    values = complete(card, card.candidate, "candidate", metric, policy, found)
    if values is None:
        return
    if not values:
        text = f"{metric}: nothing to judge, the candidate refused every question; floor {bound:g}"
        found.checks.append(
            Check(family="quality", name=metric, kind="floor", outcome="FAIL", bound=bound,
                  n=0, detail=text)
        )  # fmt: skip
        return
    at = statistics.estimate(
        list(values.values()), [card.cluster(q) for q in values], policy.resamples, policy.seed
    )
    passed = at.mean >= bound
    text = (
        f"{metric}: mean {at.mean:.3f} {'meets' if passed else 'misses'} the floor {bound:g} "
        f"(95 % interval {at.low:.3f} to {at.high:.3f}, n = {at.n})"
    )
    found.checks.append(
        Check(
            family="quality", name=metric, kind="floor", outcome="PASS" if passed else "FAIL",
            value=at.mean, bound=bound, low=at.low, high=at.high, n=at.n, detail=text,
            change=f"a mean {'under' if passed else 'of'} {bound:g}: "
            f"{abs(at.mean - bound) * at.n:.1f} points {'fewer' if passed else 'more'} over the "
            f"{at.n} questions",
            evidence={"documents": at.clusters, "method": f"bootstrap over {at.unit}s"},
        )
    )  # fmt: skip


def _pairs(
    card: Card, metric: Blocking, other: Other, policy: Policy, found: Found
) -> Asked | None:
    """The two systems' scores on the questions that both were asked; None: reported as INVALID."""
    limits = policy.coverage
    name = metric.metric
    theirs = other.scores.get(name, {})
    invalid = 0
    if doubt := card.doubts.get(name):
        found.invalid(name, f"{name}: its judge may decide nothing: {doubt}", against=other.name)
        return None
    if metric.judge:
        mine, theirs, invalid = _judged(card, name, other)
        if invalid > limits.judge_invalid * max(1, len(mine)):
            found.invalid(
                name,
                f"{name} against {other.name}: {invalid} of {len(mine)} judge verdicts are "
                f"invalid (at most {limits.judge_invalid:.0%} may be)",
                against=other.name,
            )
            return None
    else:
        complete_mine = complete(card, card.candidate, "candidate", name, policy, found)
        if other.release is None:
            theirs = complete(card, other.scores, other.name, name, policy, found) or {}
        if complete_mine is None or not theirs:
            return None
        mine = complete_mine
    return _asked(card, metric, other, mine, theirs, invalid, policy, found)


def _asked(
    card: Card,
    metric: Blocking,
    other: Other,
    mine: Values,
    theirs: Values,
    invalid: int,
    policy: Policy,
    found: Found,
) -> Asked | None:
    """The comparison of two systems' scores, if enough questions are common to both."""
    name, limits = metric.metric, policy.coverage
    still = sum(question in card.questions for question in theirs)
    if other.release is not None and still < limits.min_common * len(theirs):
        found.invalid(
            name,
            f"{name}: only {still} of the {len(theirs)} questions that release {other.release} "
            f"was scored on are still asked (at least {limits.min_common:.0%} must be)",
            against=other.name,
        )
        return None
    common = [question for question in mine if question in theirs]
    if len(common) < limits.min_pairs:
        found.invalid(
            name,
            f"{name}: {len(common)} questions in common with {other.name}; "
            f"a comparison needs {limits.min_pairs}",
            against=other.name,
        )
        return None
    if len(common) < len(mine):
        found.notes.append(
            f"{name}: {len(mine) - len(common)} questions are new since release {other.release} "
            f"({other.name}) and not compared"
        )
    sign = -1.0 if name in scoring.LOWER_IS_BETTER else 1.0
    first = [sign * mine[question] for question in common]
    second = [sign * theirs[question] for question in common]
    binary = metric.scale == "binary"
    if binary and sign < 0:
        first, second = [1 + value for value in first], [1 + value for value in second]
    clusters = [card.cluster(question) for question in common]
    result = paired.compare(
        first, second, clusters, binary=binary, resamples=policy.resamples, seed=policy.seed
    )
    if len(set(clusters)) < statistics.MIN_CLUSTERS:
        found.notes.append(
            f"{name}: fewer than {statistics.MIN_CLUSTERS} documents, so bounds are optimistic"
        )
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    share = invalid / max(1, len(mine))
    return Asked(metric, other, result, len(common), len(set(clusters)), changed, share)


def _judged(card: Card, metric: str, other: Other) -> tuple[Values, Values, int]:
    """Judge's scores of both, invalid ones against the candidate: its own count as the worst
    value, the other's as the best. So a judge that breaks can never raise the candidate."""
    expected = card.expected(card.candidate, metric)
    own, foreign = card.candidate.get(metric, {}), other.scores.get(metric, {})
    bad = worst(metric)
    mine = {question: own.get(question, bad) for question in expected}
    asked = expected
    if other.release is not None:  # questions that it was asked at all
        seen = {question for values in other.scores.values() for question in values}
        asked = [question for question in expected if question in seen]
    theirs = {question: foreign.get(question, 1.0 - bad) for question in asked}
    broken = {question for question in expected if question not in own}
    broken |= {question for question in asked if question not in foreign}
    return mine, theirs, len(broken)


def _compared(item: Asked, worse: bool, policy: Policy, look: Look, found: Found) -> None:
    """The check of one comparison."""
    metric, other, result = item.metric, item.other, item.result
    level = look.level(policy.looks.alpha)
    low, high = tidy(result.low(level)), tidy(result.high(level))
    excluded = low > -metric.margin
    broken = item.invalid_share > policy.coverage.judge_undecided
    outcome: Word = "FAIL" if worse else "PASS" if excluded and not broken else "UNDECIDED"
    final_se = result.se * (look.sizes[look.number] / look.sizes[-1]) ** 0.5
    final_level = spending.levels(policy.looks.alpha, look.fractions)[-1]
    power = {
        "now": tidy(paired.power_at(metric.margin, result.se, level)),
        "at_last_look": tidy(paired.power_at(metric.margin, final_se, final_level)),
    }
    detectable = {
        "now": tidy(paired.detectable(result.se, level)),
        "at_last_look": tidy(paired.detectable(final_se, final_level)),
    }
    said = {
        "FAIL": f"is shown to be worse than {other.name}",
        "PASS": f"does not lose more than {metric.margin:g} against {other.name}",
        "UNDECIDED": f"may lose more than {metric.margin:g} against {other.name}, or not",
    }[outcome]
    text = (
        f"{metric.metric}: the candidate {said}: mean difference {result.mean:+.3f}, one-sided "
        f"bounds {low:+.3f} and {high:+.3f} at level {level:.2g}, n = {item.n}"
    )
    if broken:
        text += f"; {item.invalid_share:.1%} of the judge's verdicts are invalid"
    if metric.margin < detectable["at_last_look"]:
        found.notes.append(
            f"{metric.metric} against {other.name}: power {power['at_last_look']:.2f} to see a "
            f"loss of {metric.margin:g} with all {look.sizes[-1]} questions (0.8 is wanted); what "
            f"is seen in four of five cases is {detectable['at_last_look']:.3f}"
        )
    found.checks.append(
        Check(
            family="quality", name=metric.metric, kind="paired", against=other.name,
            outcome=outcome, value=tidy(result.mean), bound=-metric.margin, low=low, high=high,
            n=item.n, detail=text, change=_change(item, outcome, level),
            evidence={
                "method": result.method, "documents": item.documents, "changed": item.changed,
                "level": tidy(level), "p_worse": tidy(result.p_worse()), "power": power,
                "detectable": detectable, "invalid_share": tidy(item.invalid_share),
                "release": other.release,
            },
        )
    )  # fmt: skip


def _change(item: Asked, outcome: Word, level: float) -> str:
    """What would change this comparison's outcome."""
    margin, mean, se = item.metric.margin, item.result.mean, item.result.se
    if outcome == "FAIL":
        return (
            f"answers at least as good as those of {item.other.name}; the questions that moved "
            "most are in the report"
        )
    if outcome == "PASS":
        return f"a mean difference {mean + margin:.3f} lower would no longer be within the margin"
    room = mean + margin
    if room <= 0:
        return f"a mean difference above {-margin:+.3f}; more questions alone rather show a FAIL"
    needed = item.n * (paired.quantile(level) * se / room) ** 2
    return f"about {max(item.n + 1, round(needed))} questions, if the difference stays {mean:+.3f}"


def tidy(value: float) -> float:
    """Six decimals: enough to read, and equal on machines whose sums differ in the last bit."""
    return round(float(value), 6) + 0.0
