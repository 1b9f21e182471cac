"""Deterministic metrics of one answer.

In: an answer's text and the passages it was shown; for golden questions also the reference
sentence. Out: numbers in [0, 1]. No model, no clock, no randomness: the same functions score the
gate's questions and last night's traffic, so the two can be compared.

Text is compared as a sequence of lower-case words: case, whitespace, punctuation and citation marks
never decide a score.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from contracts.records import REFUSAL

#: To which questions a metric applies. ``answered``: those that the system did not refuse.
Applies = Literal["answerable", "unanswerable", "answered"]
METRICS: dict[str, Applies] = {
    "answer_overlap": "answerable",
    "exact_match": "answerable",
    "retrieved": "answerable",
    "false_refusal": "answerable",
    "citation_in_context": "answered",
    "refusal_on_unanswerable": "unanswerable",
}
#: More is worse: a paired comparison turns the sign of these.
LOWER_IS_BETTER = frozenset({"false_refusal"})

#: ``[2]`` or ``[1, 3]``, as resources.rag reads them (a test holds the two together).
_MARKS = re.compile(r"\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")
#: Marks that stand together: "[1][3]", "[1], [3]".
_GROUP = re.compile(rf"{_MARKS.pattern}(?:[\s,;.]*{_MARKS.pattern})*")
_WORD = re.compile(r"\w+")


def unmarked(text: str) -> str:
    """``text`` without citation marks, whitespace collapsed."""
    return " ".join(_MARKS.sub(" ", text).split())


def words(text: str) -> list[str]:
    """Lower-case words of ``text`` without citation marks; Unicode forms are unified (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", unmarked(text)).casefold())


def contains(text: str, part: str) -> bool:
    """True when the words of ``part`` stand in ``text`` one after the other; no words never do."""
    inner = words(part)
    return bool(inner) and f" {' '.join(inner)} " in f" {' '.join(words(text))} "


def is_refusal(answer: str) -> bool:
    """True when the answer is the refusal, whitespace and marks aside: the gateway's rule."""
    return unmarked(answer) == REFUSAL


def cited(answer: str) -> list[int]:
    """Passage numbers in the answer's ``[n]`` marks, each once, in order of appearance."""
    return list(
        dict.fromkeys(int(number) for mark in _MARKS.findall(answer) for number in mark.split(","))
    )


def overlap(answer: str, reference: str) -> float:
    """Word F1 of answer and reference; the refusal scores 0 whatever words it shares."""
    if is_refusal(answer):
        return 0.0
    got, want = Counter(words(answer)), Counter(words(reference))
    common = sum((got & want).values())
    return 2 * common / (sum(got.values()) + sum(want.values())) if common else 0.0


def claims(answer: str) -> list[tuple[str, list[int]]]:
    """The answer cut at its citation marks: each piece of text with the marks that follow it.

    ``"A is b. [2] C is d. [1][3]"`` gives ``[("A is b.", [2]), ("C is d.", [1, 3])]``; text after
    the last mark is a claim with no marks. Pieces without a word are dropped.
    """
    found: list[tuple[str, list[int]]] = []
    position = 0
    for group in _GROUP.finditer(answer):
        found.append((answer[position : group.start()], cited(group.group())))
        position = group.end()
    found.append((answer[position:], []))
    return [(text, marks) for text, marks in found if words(text)]


def citation_in_context(answer: str, passages: Mapping[int, str]) -> float:
    """1.0 when every claim cites, every cited passage exists and one of them holds the claim.

    "Holds" means: the claim's words occur in that passage's text one after the other. One claim
    that fails makes the answer 0.0; so does an answer without any claim.
    """
    pieces = claims(answer)
    for text, marks in pieces:
        if not marks or any(mark not in passages for mark in marks):
            return 0.0
        if not any(contains(passages[mark], text) for mark in marks):
            return 0.0
    return float(bool(pieces))


def grounded(answer: str, passages: Mapping[int, str]) -> float:
    """1.0 when every claim stands in some passage that was shown, cited or not."""
    pieces = claims(answer)
    return float(
        bool(pieces)
        and all(any(contains(text, piece) for text in passages.values()) for piece, _ in pieces)
    )


def score_answer(
    answer: str, *, answerable: bool, reference: str | None, passages: Mapping[int, str]
) -> dict[str, float]:
    """Every metric of :data:`METRICS` that applies to this question and answer.

    Raises:
        ValueError: an answerable question comes without a reference.
    """
    refused = is_refusal(answer)
    scores: dict[str, float] = {}
    if not refused:
        scores["citation_in_context"] = citation_in_context(answer, passages)
    if not answerable:
        return scores | {"refusal_on_unanswerable": float(refused)}
    if not reference:
        raise ValueError("an answerable question needs its golden answer")
    return scores | {
        "answer_overlap": overlap(answer, reference),
        "exact_match": float(contains(answer, reference)),
        "retrieved": float(any(contains(text, reference) for text in passages.values())),
        "false_refusal": float(refused),
    }
