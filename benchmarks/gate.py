"""How often the gate is wrong: equal candidates that it blocks, worse ones that it lets through.

    python -m benchmarks.gate                  # the table of docs/gates.md, some minutes
    python -m benchmarks.gate --simulations 100

Each simulated gate compares a candidate with a live release on n questions, ten a document, by the
blocking metrics, margins and statistics of data/policies/gate.yaml. Difficulty differs from
question to question (mean 0.74), each system has luck of its own with every document (standard
deviation 0.03), and each answers every question once, by chance: the noisiest case, since an
unchanged greedy answer would cancel exactly. "Worse" is 5 points on every question. The naive rule
blocks whenever the mean of exact match is lower. ``three looks`` has 40 %, 70 % and all of the
questions.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.policy import Policy, load_policy
from contracts.settings import ROOT
from stages.gating import quality
from stages.gating.card import Card, Other, Scores
from stages.gating.quality import Look
from stages.gating.verdict import overall

if TYPE_CHECKING:
    import numpy as np

PER_DOCUMENT = 10
LUCK = 0.03
LOOKS = (0.4, 0.7, 1.0)


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    n: int
    loss: float
    looks: int
    simulations: int
    naive: float  # shares of the simulated gates
    fail: float
    undecided: float
    passed: float


def answers(rng: np.random.Generator, difficulty: np.ndarray, loss: float) -> Scores:
    """One system's scores: exact or not, the overlap that goes with it, now and then a refusal."""
    import numpy as np

    n = len(difficulty)
    luck = np.repeat(rng.normal(0, LUCK, n // PER_DOCUMENT), PER_DOCUMENT)
    exact = rng.random(n) < np.clip(difficulty + luck - loss, 0, 1)
    refused = ~exact & (rng.random(n) < 0.15)
    partial = rng.beta(2, 3, n)
    overlap = np.where(exact, 1.0, np.where(refused, 0.0, partial))
    names = [f"q{at}" for at in range(n)]
    return {
        "exact_match": dict(zip(names, exact.astype(float).tolist(), strict=True)),
        "answer_overlap": dict(zip(names, overlap.tolist(), strict=True)),
        "false_refusal": dict(zip(names, refused.astype(float).tolist(), strict=True)),
    }


def part(scores: Scores, names: set[str]) -> Scores:
    """The scores of some questions."""
    return {
        metric: {name: value for name, value in values.items() if name in names}
        for metric, values in scores.items()
    }


def gate(
    rng: np.random.Generator, n: int, loss: float, looks: int, policy: Policy
) -> tuple[bool, str]:
    """(does the naive rule block, the gate's word) of one simulated candidate."""
    difficulty = rng.beta(2.2, 0.78, n)
    live, candidate = answers(rng, difficulty, 0.0), answers(rng, difficulty, loss)
    sizes = tuple(round(n * share / 10) * 10 for share in (LOOKS if looks == 3 else (1.0,)))
    naive = sum(candidate["exact_match"].values()) < sum(live["exact_match"].values())
    word = "UNDECIDED"
    for number, count in enumerate(sizes):
        questions = {
            f"q{at}": {"id": f"q{at}", "question": "", "document": f"d{at // PER_DOCUMENT}",
                       "answerable": True}
            for at in range(count)
        }  # fmt: skip
        known = frozenset(("candidate", metric) for metric in candidate)
        card = Card(questions, part(candidate, set(questions)), {}, known, None)
        other = Other("live", part(live, set(questions)), "0" * 16)
        word = overall(quality.compare(card, [other], policy, Look(number, sizes)).checks)
        if word != "UNDECIDED":
            break
    return naive, word


def cell(n: int, loss: float, looks: int, simulations: int, policy: Policy, seed: int = 1) -> Cell:
    """Simulate one line."""
    import numpy as np

    rng = np.random.default_rng([seed, n, round(1000 * loss), looks])
    found = [gate(rng, n, loss, looks, policy) for _ in range(simulations)]
    words = Counter(word for _, word in found)
    share = {word: words[word] / simulations for word in ("FAIL", "UNDECIDED", "PASS")}
    naive = sum(blocked for blocked, _ in found) / simulations
    return Cell(
        n, loss, looks, simulations, naive, share["FAIL"], share["UNDECIDED"], share["PASS"]
    )


def policy_of(resamples: int | None = None) -> Policy:
    """The repository's policy."""
    found = load_policy(ROOT / "data" / "policies" / "gate.yaml")
    return found if resamples is None else found.model_copy(update={"resamples": resamples})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=None, help="the policy's by default")
    given = parser.parse_args()
    policy = policy_of(given.resamples)
    started = time.monotonic()
    print("| candidate | questions | naive rule blocks | FAIL | UNDECIDED | PASS |")
    print("|---|---|---|---|---|---|")
    for loss in (0.0, 0.05):
        for n, looks in ((200, 1), (500, 1), (1000, 1), (1000, 3)):
            found = cell(n, loss, looks, given.simulations, policy)
            name = "equal" if not loss else f"{100 * loss:g} points worse"
            asked = f"{n}, three looks" if looks == 3 else f"{n}"
            shares = (found.naive, found.fail, found.undecided, found.passed)
            print(
                f"| {name} | {asked} | " + " | ".join(f"{100 * share:.1f} %" for share in shares)
                + " |",
                flush=True,
            )  # fmt: skip
    print(f"\n{given.simulations} simulations a line, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
