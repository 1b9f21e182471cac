"""Examples made from documents: questions of which a sentence is the answer, and their passages.

In: documents without golden questions, their chunks, a seed. Out: ``contracts.records.Example`` of
the splits ``train`` and ``reserve``. The same seed and documents give the same examples in the same
order. The questions are those of ``stages.nano.questions``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from contracts.errors import InputError
from contracts.params import Examples as ExamplesParams
from contracts.records import Document, Example, Passage, Question
from stages.leakage import leakage
from stages.nano import batches, layout, words

PER_CONTEXT = 8  # training questions that share their passages: packed, they cost one context
PER_RESERVE = 2  # reserve questions of one context: many documents tell more than many questions
GUIDE_SHARE = 0.5  # of training contexts from Markdown documents, however few: the house style


def name_of(document: Document) -> str:
    """How golden questions name a document: its path in this repository, else its id."""
    return document.git_path or document.doc_id


@dataclass(frozen=True)
class Shown(batches.Passage):
    """A chunk that may be shown."""

    chunk_id: str = ""
    path: str = ""
    document: str = ""


def training(
    documents: Sequence[Document],
    chunks: Sequence[dict[str, Any]],
    golden: Sequence[Question],
    count: int,
    unanswerable: float,
    seed: int | str,
    split: Literal["train", "reserve"] = "train",
    per_context: int = PER_CONTEXT,
) -> list[Example]:
    """``count`` generated examples from chunks of ``documents`` alone, or as many as there are.

    Answers and questions that a golden question has, too, are left out: pages repeat each other.
    """
    guide, rest = shown_chunks(documents, chunks)
    pools = [pool for pool in (guide, rest) if pool]
    if not pools:
        raise InputError(
            "No document is left to train on: every one has golden questions.",
            where="data/golden/questions.yaml",
            next="keep some documents without questions, or add a source to documents.sources",
        )
    rarity_of = words.rarity(one.text for pool in pools for doc in pool for one in doc)
    makers = [batches.Maker(pool, rarity_of) for pool in pools]
    taken = {layout.normal(q.question) for q in golden}
    taken |= {layout.normal(q.answer) for q in golden if q.answer}
    rng = random.Random(f"{seed}/examples")
    made: list[Example] = []
    for attempt in range(20 * count):
        if len(made) >= count:
            break
        maker = makers[0] if len(makers) == 1 or rng.random() < GUIDE_SHARE else makers[1]
        shown, hidden = maker.context(rng, 3)
        items = maker.items(shown, hidden, rng, per_context, unanswerable)
        for item in items[: count - len(made)]:
            example = _example(f"{split}-{attempt:05d}-{len(made):05d}", item, shown, split)
            if example and not taken & {
                layout.normal(example.question),
                layout.normal(example.answer or ""),
            }:
                taken.add(layout.normal(example.question))
                made.append(example)
    return made


def reserve(
    documents: Sequence[Document],
    chunks: Sequence[dict[str, Any]],
    golden: Sequence[Question],
    others: Sequence[Example],
    knobs: ExamplesParams,
) -> list[Example]:
    """Up to ``knobs.reserve`` questions from documents that ``others`` (training, dev) never show.

    Their passages are retrieved when they are answered, as those of ``test``. A question or answer
    that stands in another split as well is left out, and so is one that training gives away.
    """
    seen = {one.chunk_id.rpartition("#")[0] for row in others for one in row.passages or []}
    unseen = [doc for doc in documents if doc.doc_id not in seen]
    if not unseen or not knobs.reserve:
        return []
    made = training(
        unseen, chunks, golden, 3 * knobs.reserve, 0.0, f"{knobs.seed}/reserve", "reserve",
        PER_RESERVE,
    )  # fmt: skip
    taken = {identity for row in others for identity in identities(row)}
    fresh: list[Example] = []
    for row in made:
        mine = [one for one in identities(row) if one[0] != "document"]
        if row.answerable and not taken.intersection(mine):
            taken.update(mine)
            fresh.append(row.model_copy(update={"passages": None}))
    leaked = leakage(
        {row.id: row.question for row in fresh},
        {row.id: row.question for row in others if row.split == "train"},
    )
    gone = {leak.protected for _, leak in leaked}
    return [row for row in fresh if row.id not in gone][: knobs.reserve]


def shown_chunks(
    documents: Sequence[Document], chunks: Iterable[dict[str, Any]]
) -> tuple[list[list[Shown]], list[list[Shown]]]:
    """Chunks by document: those of Markdown pages, those of everything else."""
    names = {doc.doc_id: name_of(doc) for doc in documents}
    by_document: dict[str, list[Shown]] = {}
    for row in chunks:
        if row["doc_id"] in names:
            by_document.setdefault(row["doc_id"], []).append(
                Shown(
                    title=row["title"],
                    heading=row["heading"],
                    text=" ".join(row["text"].split()),
                    chunk_id=row["chunk_id"],
                    path=row["path"],
                    document=names[row["doc_id"]],
                )
            )
    guide = [found for name, found in by_document.items() if names[name].endswith(".md")]
    rest = [found for name, found in by_document.items() if not names[name].endswith(".md")]
    return guide, rest


def passage(one: Shown, n: int) -> Passage:
    return Passage(
        n=n,
        chunk_id=one.chunk_id,
        path=one.path,
        title=one.title,
        heading=one.heading,
        text=one.text,
        score=0.0,  # not from a search
    )


def _example(
    name: str, item: batches.Item, shown: Sequence[Any], split: Literal["train", "reserve"]
) -> Example | None:
    """The record of one generated question; None where its answer is no verbatim text."""
    label, _, line = item.target.partition(" ")
    passages = [passage(one, one.n) for one in shown]
    if label == layout.REFUSE:
        return Example(
            id=name, split=split, question=item.question, document=None, section=None,
            answer=None, passages=passages, answerable=False,
        )  # fmt: skip
    source = shown[int(label[1]) - 1]
    answer = " ".join(line.rpartition(" [")[0].split())
    if answer not in source.text:
        return None
    return Example(
        id=name, split=split, question=item.question, document=source.document,
        section=source.heading, answer=answer, passages=passages, answerable=True,
    )  # fmt: skip


def identities(row: Example) -> list[tuple[str, str]]:
    """What must not be met again in another split."""
    found = [("question", layout.normal(row.question))]
    if row.document:
        found.append(("document", row.document))
    if row.answer:
        found.append(("answer", layout.normal(row.answer)))
    return found
