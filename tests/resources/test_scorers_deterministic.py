"""resources.scorers.deterministic: what each metric counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.records import REFUSAL
from resources import rag
from resources.scorers import deterministic as scoring

CACHE = "The cache is content-addressed."
PASSAGES = {1: f"Intro. {CACHE} It never expires.", 2: "Rollback flips one pointer, `stable`."}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (f"{CACHE} [1]", 1.0),
        ("the CACHE  is\ncontent addressed [1]", 1.0),  # case, whitespace, punctuation
        (f"{CACHE} [2]", 0.0),  # cites the wrong passage
        (f"{CACHE} [3]", 0.0),  # cites a passage that was not shown
        (f"{CACHE} [1][3]", 0.0),  # one of two marks was made up
        (f"{CACHE} [2, 1]", 1.0),  # one of the two holds it
        (f"{CACHE}", 0.0),  # cites nothing
        (f"{CACHE} [1] Rollback flips one pointer. [2]", 1.0),
        (f"{CACHE} [1] Rollback flips two pointers. [2]", 0.0),
        (f"{CACHE} [1] And more.", 0.0),  # a last claim without a mark
        ("ache is content [1]", 0.0),  # words, not characters
        ("[1]", 0.0),
        ("", 0.0),
    ],
)
def test_citation_in_context(answer: str, value: float) -> None:
    assert scoring.citation_in_context(answer, PASSAGES) == value


def test_grounded_needs_no_marks_but_every_claim() -> None:
    assert scoring.grounded(f"{CACHE} [2]", PASSAGES) == 1.0
    assert scoring.grounded(f"{CACHE} It costs nothing.", PASSAGES) == 0.0
    assert scoring.grounded("", PASSAGES) == 0.0


def test_overlap_is_word_f1_and_a_refusal_earns_nothing() -> None:
    assert scoring.overlap(f"{CACHE} [1]", CACHE) == 1.0
    assert scoring.overlap("the cache", CACHE) == pytest.approx(2 * 2 / (2 + 5))
    assert scoring.overlap("entirely other words", CACHE) == 0.0
    assert scoring.overlap(REFUSAL, "The documents do not say much.") == 0.0


def test_score_answer_gives_exactly_the_metrics_that_apply() -> None:
    good = scoring.score_answer(f"{CACHE} [1]", answerable=True, reference=CACHE, passages=PASSAGES)
    assert good == {
        "citation_in_context": 1.0,
        "answer_overlap": 1.0,
        "exact_match": 1.0,
        "retrieved": 1.0,
        "false_refusal": 0.0,
    }
    shy = scoring.score_answer(REFUSAL, answerable=True, reference=CACHE, passages=PASSAGES)
    assert shy == {
        "answer_overlap": 0.0,
        "exact_match": 0.0,
        "retrieved": 1.0,
        "false_refusal": 1.0,
    }
    none = scoring.score_answer(REFUSAL, answerable=False, reference=None, passages=PASSAGES)
    assert none == {"refusal_on_unanswerable": 1.0}
    bold = scoring.score_answer(f"{CACHE} [1]", answerable=False, reference=None, passages=PASSAGES)
    assert bold == {"citation_in_context": 1.0, "refusal_on_unanswerable": 0.0}
    with pytest.raises(ValueError, match="golden"):
        scoring.score_answer("x", answerable=True, reference=None, passages={})


@pytest.mark.parametrize(
    "answer",
    [
        "a [1].",
        "a [1, 3] b [2]",
        "a [1][2]",
        "[x] [1234] a",
        REFUSAL,
        f"{REFUSAL} [1]",
        "the docs",
        "",
    ],
)
def test_marks_and_refusals_are_read_as_the_gateway_reads_them(answer: str) -> None:
    assert scoring.cited(answer) == rag.cited_numbers(answer)
    assert scoring.is_refusal(answer) == rag.is_refusal(answer)


@given(st.text(alphabet="ab c.[]12,\n", max_size=40))
def test_claims_lose_no_word(answer: str) -> None:
    """Every word outside marks stands in exactly one claim, in order."""
    pieces = [word for text, _ in scoring.claims(answer) for word in scoring.words(text)]
    assert pieces == scoring.words(answer)
