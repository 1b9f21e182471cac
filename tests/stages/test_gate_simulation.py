"""Simulated gates, as benchmarks/gate.py has them, a few: how often the verdict is wrong."""

from __future__ import annotations

from benchmarks import gate

POLICY = gate.policy_of(resamples=1000)


def test_equal_candidates_fail_rarely_where_a_lower_mean_is_a_coin_toss() -> None:
    """150 gates of 300 questions; the benchmark's 1,000 stand in docs/gates.md."""
    found = gate.cell(300, 0.0, 1, 150, POLICY)
    assert found.fail <= 0.08  # 5 % and two standard errors
    assert 0.35 <= found.naive <= 0.65
    assert found.passed > 0.1


def test_five_points_at_1000_questions_are_blocked() -> None:
    found = gate.cell(1000, 0.05, 1, 60, POLICY)
    assert found.passed <= 0.1 and found.fail >= 0.6


def test_three_looks_do_not_fail_more_equal_candidates() -> None:
    found = gate.cell(200, 0.0, 3, 80, POLICY)
    assert found.fail <= 0.1


def test_an_unchanged_system_always_passes() -> None:
    """Greedy answers that are the same cancel, whatever the number of questions."""
    import numpy as np

    from stages.gating import quality
    from stages.gating.card import Card, Other
    from stages.gating.quality import Look
    from stages.gating.verdict import overall

    rng = np.random.default_rng(2)
    scores = gate.answers(rng, rng.beta(2, 1, 50), 0.0)
    questions = {
        f"q{at}": {"id": f"q{at}", "question": "", "document": f"d{at // 10}", "answerable": True}
        for at in range(50)
    }
    known = frozenset(("candidate", metric) for metric in scores)
    card = Card(questions, scores, {}, known, None)
    found = quality.compare(card, [Other("live", scores, "0" * 16)], POLICY, Look(0, (50, 100)))
    assert overall(found.checks) == "PASS"
