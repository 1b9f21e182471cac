"""What the answers of one arm came to: a histogram of losses for every metric.

In: rows of the request log. Out: :class:`Arm`, which is counted up and never reads a clock.

A row counts for a metric or it does not; which rows do is the same for both arms:

* errors: every answer, and every failure that is ours or the engine's. Not: what a client did
  wrong, a key may not do, or a guard refused to let in; clients that left.
* ttft: answers that began; a client that left after the bound without a first word was shown none
  in time.
* cost, refusals: answers; quality: those of them that are no refusal. A score that is INVALID is
  the candidate's worst, and none of the stable release's: nothing is ever shown by it.
* unsafe: answers that a guard withheld, among all that count for errors.

Answers from a cache say nothing about a release and count nowhere: a candidate's cache is cold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, get_args

from serving.rollout.policy import FloorName, MetricName, Policy
from serving.rollout.sequential import LEVELS, Sample

#: Codes of envelope.CODES that a release or its engine is to blame for.
FAILURES = frozenset(
    {
        "context_length_exceeded", "engine_refused_request", "internal_error", "overloaded",
        "engine_unreachable", "engine_error", "engine_disconnected", "engine_malformed_stream",
        "engine_overloaded", "engine_timeout",
    }
)  # fmt: skip
WITHHELD = "output_blocked"
LEFT = "client_disconnected"
Row = Mapping[str, Any]
#: Quality of an answered row in [0, 1]; None where it cannot be told.
Scorer = Callable[[Row], float | None]


@dataclass(frozen=True)
class Reference:
    """Bounds of this rollout, fixed before its first step: quantiles of the stable release."""

    ttft_ms: float
    cost: float


@dataclass
class Arm:
    """Losses by metric (of the first answers of each session) and by floor (of all answers)."""

    candidate: bool = False
    metrics: dict[MetricName, list[int]] = field(
        default_factory=lambda: {name: [0] * (LEVELS + 1) for name in get_args(MetricName)}
    )
    floors: dict[FloorName, list[int]] = field(
        default_factory=lambda: {name: [0, 0] for name in get_args(FloorName)}
    )
    requests: int = 0
    sessions: dict[tuple[str, str], int] = field(default_factory=dict)

    def sample(self, name: MetricName) -> Sample:
        return Sample(tuple(self.metrics[name]))

    def floor(self, name: FloorName) -> Sample:
        fine, bad = self.floors[name]
        return Sample.share(bad, fine + bad)

    @property
    def answers(self) -> int:
        """That count for the metrics."""
        return sum(self.metrics["errors"])

    def add(self, row: Row, failed: bool, policy: Policy, bounds: Reference, score: Scorer) -> None:
        """Count one row of the log.

        Args:
            failed: whatever the row says: another arm had to answer.
            score: asked of sampled answers.
        """
        self.requests += 1
        code = LEFT if row["cached"] else row["error"]
        bad = failed or code in FAILURES
        judged = bad or code in (None, WITHHELD)
        if judged:
            self.floors["errors"][bad] += 1
            self.floors["unsafe"][code == WITHHELD and not failed] += 1
        late = (
            code == LEFT and not row["cached"] and row["ttft_ms"] is None
            and row["latency_ms"] > bounds.ttft_ms
        )  # fmt: skip
        if (not judged and not late) or not self._counts(row, policy.per_session):
            return
        if late and not failed:
            self.metrics["ttft"][-1] += 1
            return
        self.metrics["errors"][LEVELS * bad] += 1
        if bad or code is not None:
            return
        self._answered(row, policy, bounds, score)

    def _answered(self, row: Row, policy: Policy, bounds: Reference, score: Scorer) -> None:
        if row["ttft_ms"] is not None:  # the gateway refuses without asking a model
            self.metrics["ttft"][LEVELS * (row["ttft_ms"] > bounds.ttft_ms)] += 1
        self.metrics["cost"][LEVELS * (cost(row, policy) > bounds.cost)] += 1
        self.metrics["refusals"][LEVELS * bool(row["refused"])] += 1
        if not row["refused"] and _sampled(row["response_id"], policy.metrics.quality.sample):
            quality = score(row)
            if quality is not None or self.candidate:
                self.metrics["quality"][round(LEVELS * (1 - (quality or 0.0)))] += 1

    def _counts(self, row: Row, most: int) -> bool:
        """Whether it is one of the first of its session; a session's later answers are no
        independent evidence, because all of them go to one arm."""
        if not row["session"]:
            return True
        key = (row["tenant"], row["session"])
        seen = self.sessions.get(key, 0)
        self.sessions[key] = seen + 1
        return seen < most


def cost(row: Row, policy: Policy) -> float:
    """What an answer cost, in money where it has a price and in weighted tokens otherwise."""
    weights = policy.metrics.cost
    tokens = (row["prompt_tokens"] or 0) * weights.input
    return float(row["cost"] or tokens + (row["completion_tokens"] or 0) * weights.output)


def reference(rows: Sequence[Row], policy: Policy) -> Reference | None:
    """Quantiles of what a model answered; None until there are enough."""
    told = [r for r in rows if r["error"] is None and not r["cached"] and r["ttft_ms"] is not None]
    if len(told) < policy.reference:
        return None
    return Reference(
        ttft_ms=_quantile([r["ttft_ms"] for r in told], policy.metrics.ttft.quantile),
        cost=_quantile([cost(r, policy) for r in told], policy.metrics.cost.quantile),
    )


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _sampled(response_id: str, share: float) -> bool:
    if share >= 1:
        return True
    number = int.from_bytes(blake2b(response_id.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64
