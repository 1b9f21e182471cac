"""Whether a search found what a question needs: relevance, metrics, and their uncertainty.

In: a golden question and the hits of a search. Out: metrics a question, means over many, and 95 %
intervals.

What counts. The right *section* of a question is what stands below its heading in its document; a
chunk belongs to it when it comes from that document and the heading stands in its heading path, or
when it holds the answer. ``recall_at_k`` is the share of questions with such a chunk among the
first k; ``answer_at_k`` asks for more: the answer itself, whole and verbatim up to white space,
within the first k chunks, which is what a model that copies can use. ``mrr`` is the mean of
1 / rank of the first right chunk among the first 10. ``ndcg_at_10`` counts every chunk of the right
section once, against the best order there is.

Intervals are percentile bootstraps that draw *documents*, not questions: questions about one page
stand or fall together, so that drawing questions one by one would promise too much (Miller, arXiv
2411.00640). On the 93 golden dev questions from 11 pages that makes the interval of nDCG@10 15 %
wider. Where all questions come from one document there is no interval. Few documents make it too
narrow all the same, so every table says how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from contracts.records import Chunk, Question
from resources.index import Hit

if TYPE_CHECKING:
    import numpy as np

DEPTH = 10  # hits that nDCG and MRR look at
RESAMPLES, SEED = 10_000, 7

#: 95 % from, to; None where one document cannot say.
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """One question under one search: its hits, and which are right."""

    question: Question
    hits: list[Hit]
    in_section: list[bool]
    has_answer: list[bool]
    relevant: int  # chunks of the right section in the whole index
    source: str = ""  # key of the source that holds the right section

    @property
    def rank(self) -> int | None:
        """Of the first right chunk, from 1; None when there is none among the hits."""
        return next((number for number, mark in enumerate(self.in_section, 1) if mark), None)


@dataclass(frozen=True)
class Summary:
    """Means over the answerable questions among some results, and their 95 % intervals."""

    questions: int
    documents: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]

    def as_json(self) -> dict[str, object]:
        return {
            "questions": self.questions,
            "documents": self.documents,
            **{
                name: [value, *(self.intervals[name] or (None, None))]
                for name, value in self.metrics.items()
            },
        }


def in_document(item: Question, chunk: Chunk, folders: dict[str, str]) -> bool:
    """Whether the chunk comes from the question's document (a path in the repository)."""
    return item.document == f"{folders.get(chunk.source, chunk.source)}/{chunk.path}"


def in_section(item: Question, chunk: Chunk, folders: dict[str, str]) -> bool:
    """Whether the chunk belongs to the right section, as the module says."""
    if not in_document(item, chunk, folders):
        return False
    return item.section in chunk.heading.split(" > ") or has_answer(item, chunk, folders)


def has_answer(item: Question, chunk: Chunk, folders: dict[str, str]) -> bool:
    """Whether the chunk holds the whole answer, verbatim up to white space."""
    if not item.answer or not in_document(item, chunk, folders):
        return False
    return " ".join(item.answer.split()) in " ".join(chunk.text.split())


def scores(result: Result, top_k: Sequence[int]) -> dict[str, float]:
    """The metrics of one answerable question."""
    marks = result.in_section
    rank = next((number for number, mark in enumerate(marks[:DEPTH], 1) if mark), None)
    gain = sum(1 / math.log2(number + 1) for number, mark in enumerate(marks[:DEPTH], 1) if mark)
    best = sum(1 / math.log2(number + 1) for number in range(1, min(DEPTH, result.relevant) + 1))
    return {
        **{f"recall_at_{k}": float(any(marks[:k])) for k in top_k},
        **{f"answer_at_{k}": float(any(result.has_answer[:k])) for k in top_k},
        "ndcg_at_10": gain / best,
        "mrr": 1 / rank if rank else 0.0,
    }


def summarise(results: Sequence[Result], top_k: Sequence[int]) -> Summary:
    """Means and intervals; unanswerable questions are not counted. No question at all gives zeros
    in ``questions`` and no metric.
    """
    import numpy as np

    asked = [result for result in results if result.question.answerable]
    rows = [scores(result, top_k) for result in asked]
    documents = [str(result.question.document) for result in asked]
    if not rows:
        return Summary(0, 0, {}, {})
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])
    means = resampled_means(values, documents)
    intervals: dict[str, Interval] = dict.fromkeys(names)
    if means is not None:
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        intervals = {name: (_six(low[at]), _six(high[at])) for at, name in enumerate(names)}
    metrics = {name: _six(value) for name, value in zip(names, values.mean(axis=0), strict=True)}
    return Summary(len(rows), len(set(documents)), metrics, intervals)


def resampled_means(values: np.ndarray, documents: Sequence[str]) -> np.ndarray | None:
    """Bootstrap means of the columns of ``values`` (questions, metrics), drawing documents.

    Returns (RESAMPLES, metrics), or None for a single document. A draw's mean is over its
    questions, so that a page with more of them weighs more, as in the mean itself.
    """
    import numpy as np

    names, member = np.unique(np.array(documents), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, member, values)
    counts = np.bincount(member).astype(float)
    draws = _draws(len(names))
    means: np.ndarray = (draws @ sums) / (draws @ counts)[:, None]
    return means


@lru_cache(maxsize=8)
def _draws(documents: int) -> np.ndarray:
    """How often each document is drawn: (RESAMPLES, documents). The same for every arm, so that
    differences between arms are paired."""
    import numpy as np

    even = np.full(documents, 1 / documents)
    return np.random.default_rng(SEED).multinomial(documents, even, RESAMPLES).astype(float)


def _six(value: float) -> float:
    return round(float(value), 6)
