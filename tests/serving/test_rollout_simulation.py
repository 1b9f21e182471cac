"""Whole rollouts in simulation: equal candidates are left alone, and bad ones are found in time.

The traffic is that of benchmarks/rollout.py, sessions that are alike within themselves among it;
counting and decisions are the real ones. The policy is one for little traffic, so that 200 rollouts
take seconds; docs/rollouts.md has the figures of the shipped one.
"""

from __future__ import annotations

import pytest

from benchmarks.rollout import CANDIDATES, STABLE, rollout
from serving.rollout.policy import Policy

POLICY = Policy.model_validate(
    {
        "canary": [{"share": 0.2, "answers": 20}, {"share": 0.5, "answers": 50}],
        "metrics": {
            "errors": {"margin": 0.1}, "ttft": {"margin": 0.2}, "cost": {"margin": 0.2},
            "refusals": {"margin": 0.2}, "quality": {"margin": 0.15},
        },
    }
)  # fmt: skip
#: Requests of both arms within which each of these is gone, in 19 of 20 rollouts.
BUDGETS = {
    "failing 30 %": 1500, "failing always": 200, "unsafe 10 %": 2000, "slow, 3 times": 1000,
    "worse, -40 points": 2500,
}  # fmt: skip


@pytest.mark.slow
def test_equal_candidates_are_taken_back_no_more_often_than_promised() -> None:
    ends = [rollout(POLICY, STABLE, seed).end for seed in range(200)]
    assert ends.count("back") <= POLICY.alpha * len(ends)
    assert ends.count("promoted") >= 0.95 * len(ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_bad_candidates_are_gone_within_their_budgets(name: str) -> None:
    found = [rollout(POLICY, CANDIDATES[name], seed) for seed in range(20)]
    assert {item.end for item in found} == {"back"}
    assert sorted(item.requests for item in found)[18] <= BUDGETS[name]


def test_one_of_each() -> None:
    assert rollout(POLICY, STABLE, 1).end == "promoted"
    bad = rollout(POLICY, CANDIDATES["failing always"], 1)
    assert bad.end == "back" and "errors" in bad.reason and bad.exposed < bad.requests / 2
