"""Forward, hold or back: what the counts of both arms say under a policy. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from contracts.records import Strategy
from serving.rollout.arms import Arm
from serving.rollout.policy import FloorName, MetricName, Policy
from serving.rollout.sequential import broken, no_worse, worse

Action = Literal["forward", "hold", "back"]


@dataclass(frozen=True)
class Finding:
    """One metric or floor of a step."""

    name: str  # "ttft", "floor unsafe"
    stable: float | None  # mean loss, lower is better
    candidate: float | None
    allowed: float  # by how much it may be worse; of a floor: up to what
    worse: float  # log evidence that it is worse than allowed
    limit: float  # of that, for going back
    no_worse: float | None = None  # log evidence that it is within what is allowed
    wanted: float | None = None  # of that, for the last step forward

    @property
    def harmful(self) -> bool:
        return self.worse >= self.limit

    @property
    def shown(self) -> bool:
        return self.no_worse is None or self.wanted is None or self.no_worse >= self.wanted

    def __str__(self) -> str:
        said = "no answer" if self.candidate is None else f"{self.candidate:.1%}"
        beside = "no answer" if self.stable is None else f"{self.stable:.1%}"
        return f"{self.name}: {said} of the candidate, {beside} of the stable release"

    def record(self) -> dict[str, Any]:
        """For the ledger and for reports: numbers, rounded."""
        return {
            name: round(value, 4) if isinstance(value, float) and math.isfinite(value)
            else None if isinstance(value, float) else value
            for name, value in vars(self).items()
        }  # fmt: skip


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    findings: tuple[Finding, ...] = ()


def decide(
    policy: Policy,
    strategy: Strategy,
    step: int,
    stable: Arm,
    candidate: Arm,
    *,
    requests: int,
    minutes: float,
) -> Decision:
    """What follows.

    Args:
        step: from 1; the last one ends with the promotion.
        stable, candidate: what they did in this step.
        requests: of both arms since the rollout began.
        minutes: since this step began.
    """
    steps = policy.steps(strategy)
    last = step == len(steps)
    found = findings(policy, strategy, stable, candidate, prove=last)
    harmful = [item for item in found if item.harmful]
    if harmful:
        return Decision("back", "; ".join(map(str, harmful)), found)
    wanted = steps[step - 1].answers
    open_points = [item.name for item in found if not item.shown]
    if candidate.answers >= wanted and not open_points:
        said = "shown to be no worse than the margins" if last else "no harm seen"
        return Decision("forward", f"{candidate.answers} answers, {said}", found)
    missing = (
        f"{candidate.answers} of {wanted} answers"
        if candidate.answers < wanted
        else f"not shown yet: {', '.join(open_points)}"
    )
    if requests >= policy.requests or minutes >= policy.step_minutes:
        spent = f"{requests} requests" if requests >= policy.requests else f"{minutes:.0f} minutes"
        return Decision(policy.undecided, f"undecided after {spent}: {missing}", found)
    return Decision("hold", missing, found)


def findings(
    policy: Policy, strategy: Strategy, stable: Arm, candidate: Arm, *, prove: bool
) -> tuple[Finding, ...]:
    """Every metric and floor. A metric without an answer on either side is open.

    Args:
        prove: whether it is to be shown that no metric is worse: the last step's task.
    """
    limit, floor_limit = policy.limits(strategy)
    wanted = math.log(1 / policy.beta)
    found = []
    for name in get_args(FloorName):
        a, b, floor = stable.floor(name), candidate.floor(name), getattr(policy.floors, name)
        evidence = broken(a, b, floor)
        found.append(Finding(f"floor {name}", a.mean, b.mean, floor, evidence, floor_limit))
    for metric in get_args(MetricName):
        s, c = stable.sample(metric), candidate.sample(metric)
        margin = getattr(policy.metrics, metric).margin
        finding = Finding(metric, s.mean, c.mean, margin, worse(s, c, margin), limit)
        if prove:
            finding = replace(finding, no_worse=no_worse(s, c, margin), wanted=wanted)
        found.append(finding)
    return tuple(found)
