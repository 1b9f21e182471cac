"""Dense, sparse or fused: chosen on dev with doubt in mind, judged once on test, told in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.params import FusedGrid, Search
from contracts.records import Question
from stages.retrieval import Findings, verdict
from stages.retrieval_choice import Choice, choose, make_arms, simultaneous
from stages.retrieval_metrics import Result
from stages.retrieval_report import page, pictures

GRID = FusedGrid(rrf_k=[60], weights=[(1.0, 0.5), (1.0, 1.0)])
FUSED = "fused 1:1, k 60"


def result(rank: int | None, number: int = 0, split: str = "dev", depth: int = 10) -> Result:
    """A question whose only right chunk stands at ``rank``; one question a document."""
    question = Question.model_validate(
        {
            "id": f"{split}-{number:02d}",
            "question": f"What is thing {number} of {split}?",
            "document": f"docs/{number}.md",
            "section": "Things",
            "answer": "A thing is a thing.",
            "split": split,
            "answerable": True,
        }
    )
    marks = [place == rank for place in range(1, depth + 1)]
    chunk = SimpleNamespace(source="docs", path="other.md", heading="Else")
    hits: list[Any] = [SimpleNamespace(chunk=chunk, score=0.5, rank_score=0.5) for _ in marks]
    return Result(question, hits, marks, marks, 1, "docs")


def ranks(values: list[int | None], split: str = "dev") -> list[Result]:
    return [result(rank, number, split) for number, rank in enumerate(values)]


def test_arms_hold_dense_sparse_the_grid_and_what_the_index_does() -> None:
    setting = Search(mode="fused", rrf_k=2, weights=(1.0, 3.0), depth=20)
    arms = make_arms(setting, GRID)
    assert list(arms) == ["dense", "sparse", "fused 1:0.5, k 60", FUSED, "fused 1:3, k 2"]
    assert arms["fused 1:3, k 2"] == setting
    assert {arm.depth for arm in arms.values()} == {20}
    assert list(make_arms(Search(), GRID)) == list(arms)[:4]


def test_a_clear_winner_is_chosen_and_confirmed() -> None:
    dev = {"dense": ranks([3, 4, 2, 5] * 6), "sparse": ranks([5] * 24), FUSED: ranks([1] * 24)}
    test = {name: ranks([item.rank for item in rows], "test") for name, rows in dev.items()}
    choice = choose(dev, test, own="dense")
    assert (choice.chosen, choice.rival, choice.confirmed) == (FUSED, FUSED, True)
    assert not choice.agrees and choice.dev[FUSED].better and not choice.dev["sparse"].better
    assert "confirms the choice. Warning: the index searches dense" in verdict(choice)
    turned = choose(dev, {**test, FUSED: ranks([6] * 24, "test")}, own=FUSED)
    assert turned.chosen == FUSED and turned.confirmed is False and turned.agrees
    assert verdict(turned).endswith("which does not confirm the choice.")


def test_a_higher_mean_alone_does_not_replace_dense() -> None:
    dev = {"dense": ranks([1, 2, 1, 2]), "sparse": ranks([9] * 4), FUSED: ranks([1, 1, 1, 3])}
    choice = choose(dev, {name: ranks([1] * 4, "test") for name in dev}, own="dense")
    assert choice.dev[FUSED].mean > 0 and not choice.dev[FUSED].better
    assert (choice.chosen, choice.rival, choice.confirmed) == ("dense", FUSED, True)
    assert choice.agrees and "does not speak against the choice." in verdict(choice)


def test_without_test_questions_nothing_is_confirmed() -> None:
    dev = {"dense": ranks([1, 2]), "sparse": ranks([2, 2])}
    choice = choose(dev, {"dense": [], "sparse": []}, own="dense")
    assert choice.test is None and choice.confirmed is None and choice.chosen == "dense"
    assert "test" not in verdict(choice)


def test_one_document_cannot_choose() -> None:
    same = [result(1, 0)] * 5
    found = simultaneous({"dense": [result(9, 0)] * 5, FUSED: same})
    assert found[FUSED].interval is None and not found[FUSED].better


@pytest.mark.slow
def test_the_best_of_many_equal_arms_is_rarely_taken_for_better() -> None:
    """Ten arms that differ from dense by chance alone, 24 documents: about 5 % of the time one
    looks better (2.5 % each, were they judged one by one, would give 15 %)."""
    rng = np.random.default_rng(11)
    taken = 0
    for _ in range(100):
        dense = ranks([int(rank) for rank in rng.integers(1, 11, 24)])
        others = {f"fused {n}": ranks([int(r) for r in rng.integers(1, 11, 24)]) for n in range(10)}
        found = simultaneous({"dense": dense, **others})
        taken += any(difference.better for difference in found.values())
    assert taken <= 10


@pytest.fixture
def findings() -> Findings:
    dev = {
        "dense": [*ranks([1, 2, 1]), result(None, 3)],
        "sparse": [*ranks([1, 2, 2]), result(2, 3)],
        FUSED: [*ranks([1, 2, 1]), result(None, 3)],
    }
    test = {name: ranks([1, None], "test") for name in dev}
    choice: Choice = choose(dev, test, own="dense")
    return Findings(
        "c" * 64, {"recall_at_10": 1.0}, [1, 10], 0.6, {"dev": dev, "test": test}, choice
    )


def test_a_missed_question_says_who_would_have_found_it(findings: Findings) -> None:
    html = page(findings, pictures(findings), "said")
    assert "dev-03: What is thing 3 of dev?" in html and "found by sparse at rank 2" in html
    assert "wanted   docs/3.md &gt; Things" in html and "docs:other.md &gt; Else" in html
    assert "test-01" not in html and "of test?" not in html
    assert [item.question.id for item in findings.missed] == ["dev-03"]


def test_sources_and_classes_are_counted_apart(findings: Findings) -> None:
    parts = findings.parts
    assert parts["class"]["dev"]["dense"]["definition"].questions == 4
    assert parts["source"]["test"][FUSED]["docs"].metrics["recall_at_10"] == 0.5
    assert findings.shown == ["dense", "sparse", FUSED]
