"""How often an equal candidate is taken back, and after how many requests a bad one is.

    python -m benchmarks.rollout [--rollouts 200] [--policy FILE] [--per-session N]

Simulated traffic through the real counting (``serving.rollout.arms``) and the real decision
(``serving.rollout.decision``), which looks every 100 requests. Sessions have 3 requests on average
and differ: some have long prompts, slow answers and hard questions, so answers of one session are
alike. The stable release fails 0.5 % of its requests, refuses 10 %, answers its first word after
200 ms (median; one in ten needs 380 ms or more) and has a mean quality of 0.85.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.rollout.arms import WITHHELD, Arm, Reference, reference
from serving.rollout.decision import Decision, decide
from serving.rollout.policy import Policy, load

LOOK_EVERY = 100


@dataclass(frozen=True)
class Release:
    """What a release does to people."""

    errors: float = 0.005
    withheld: float = 0.0
    slower: float = 1.0  # factor on the time to the first word
    longer: float = 1.0  # factor on the tokens of an answer
    refusals: float = 0.10
    quality: float = 0.85  # mean of an answer's scores


STABLE = Release()
CANDIDATES = {
    "equal": STABLE,
    "failing 5 %": replace(STABLE, errors=0.05),
    "failing 10 %": replace(STABLE, errors=0.10),
    "failing 30 %": replace(STABLE, errors=0.30),
    "failing always": replace(STABLE, errors=1.0),
    "unsafe 3 %": replace(STABLE, withheld=0.03),
    "unsafe 10 %": replace(STABLE, withheld=0.10),
    "slow, 1.5 times": replace(STABLE, slower=1.5),
    "slow, 3 times": replace(STABLE, slower=3.0),
    "dear, 1.5 times": replace(STABLE, longer=1.5),
    "refusing +25 points": replace(STABLE, refusals=0.35),
    "worse, -20 points": replace(STABLE, quality=0.65),
    "worse, -40 points": replace(STABLE, quality=0.45),
}


@dataclass(frozen=True)
class Outcome:
    """How one rollout ended. ``exposed``: answers that the candidate gave to people."""

    end: str  # promoted, back, undecided
    reason: str
    requests: int
    exposed: int


class Traffic:
    """Requests of sessions, in any number; each is answered by a release."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._open: list[tuple[str, float]] = []
        self._number = 0

    def session(self) -> tuple[str, float]:
        """The session of the next request, and how unlucky it is (standard normal). A session
        ends after a request with probability 1/3."""
        chance = self.random
        if len(self._open) < 50 or chance.random() < 1 / 3:
            self._number += 1
            self._open.append((f"s{self._number}", chance.gauss()))
            if len(self._open) > 50:
                self._open.pop(chance.randrange(50))
        return chance.choice(self._open)

    def row(self, name: str, luck: float, release: Release) -> dict[str, Any]:
        """A row of the request log. Half of a request's variation is its session's."""
        chance = self.random
        a, b, c, d = ((luck + chance.gauss()) / math.sqrt(2) for _ in range(4))
        error = None
        if _normal(a) < release.errors:
            error = "engine_error"
        elif chance.random() < release.withheld:
            error = WITHHELD
        quality = _normal(d)
        return {
            "response_id": "r",
            "tenant": "t", "session": name, "cached": "", "error": error,
            "ttft_ms": 200 * release.slower * math.exp(0.5 * b), "latency_ms": 900.0,
            "refused": _normal(c) < release.refusals, "cost": 0.0, "prompt_tokens": 400,
            "completion_tokens": int(60 * release.longer * math.exp(0.4 * chance.gauss())),
            # Mean: release.quality. Half marks are given for an interval of 0.1 around it.
            "quality": float(quality < release.quality - 0.05) / 2
            + float(quality < release.quality + 0.05) / 2,
        }  # fmt: skip


def _normal(value: float) -> float:
    """The standard normal distribution function."""
    return math.erfc(-value / math.sqrt(2)) / 2


def rollout(policy: Policy, candidate: Release, seed: int, strategy: str = "canary") -> Outcome:
    """One whole rollout, looked at every LOOK_EVERY requests."""
    traffic = Traffic(seed)
    bounds = _bounds(policy, traffic)
    requests = exposed = 0
    for step, wanted in enumerate(policy.steps(strategy), start=1):  # type: ignore[arg-type]
        stable, tried = Arm(), Arm(candidate=True)
        for decision in _looks(policy, candidate, traffic, bounds, (stable, tried), step,
                               wanted.share, requests, strategy):  # fmt: skip
            if decision.action != "hold":
                break
        requests += stable.requests + tried.requests
        exposed += tried.requests
        if decision.action == "back":
            end = "undecided" if decision.reason.startswith("undecided") else "back"
            return Outcome(end, decision.reason, requests, exposed)
    return Outcome("promoted", decision.reason, requests, exposed)


def _looks(
    policy: Policy, candidate: Release, traffic: Traffic, bounds: Reference,
    arms: tuple[Arm, Arm], step: int, share: float, before: int, strategy: str,
) -> Iterator[Decision]:  # fmt: skip
    stable, tried = arms
    while True:
        for _ in range(LOOK_EVERY):
            name, luck = traffic.session()
            mine = hash_share(name) < share
            row = traffic.row(name, luck, candidate if mine else STABLE)
            (tried if mine else stable).add(row, False, policy, bounds, lambda r: r["quality"])
        yield decide(policy, strategy, step, stable, tried,  # type: ignore[arg-type]
                     requests=before + stable.requests + tried.requests, minutes=0.0)  # fmt: skip


def hash_share(session: str) -> float:
    """As even as the gateway's: the session's number times the golden ratio."""
    return (int(session[1:]) * 0.6180339887498949) % 1.0


def _bounds(policy: Policy, traffic: Traffic) -> Reference:
    rows = [traffic.row(*traffic.session(), STABLE) for _ in range(policy.reference * 2)]
    found = reference(rows, policy)
    assert found is not None
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--rollouts", type=int, default=200, help="of the equal candidate")
    parser.add_argument("--bad", type=int, default=50, help="of each other candidate")
    parser.add_argument("--policy", type=Path, help="default: the shipped one")
    parser.add_argument("--only", help="candidates whose name begins so")
    parser.add_argument("--per-session", type=int, help="instead of the policy's")
    given = parser.parse_args(argv)
    policy = load(given.policy or Path("data/policies/rollout.yaml"))
    if given.per_session:
        policy = policy.model_copy(update={"per_session": given.per_session})
    print("| candidate | back | undecided | promoted | requests p50 | p95 | of the candidate p95 |")
    print("|---|---|---|---|---|---|---|")
    for name, candidate in CANDIDATES.items():
        if not name.startswith(given.only or ""):
            continue
        count = given.rollouts if candidate == STABLE else given.bad
        found = [rollout(policy, candidate, seed) for seed in range(count)]
        ends = [sum(item.end == end for item in found) for end in ("back", "undecided", "promoted")]
        requests = np.percentile([item.requests for item in found], (50, 95))
        exposed = np.percentile([item.exposed for item in found], 95)
        print(
            f"| {name} | {' | '.join(f'{n} of {count}' for n in ends)} "
            f"| {requests[0]:.0f} | {requests[1]:.0f} | {exposed:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
