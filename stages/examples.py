"""examples: what the adapter learns from and what the gate judges by, split by document.

In: accepted documents, their chunks, the golden questions. Out: ``train.jsonl``, ``dev.jsonl``,
``test.jsonl`` (rows are ``contracts.records.Example``) and ``manifest.json``, written last.

``dev`` and ``test`` are the golden questions of their split. Passages of ``test`` are retrieved
when it is answered; ``dev`` is shown the chunk that holds the answer and the two most alike others,
so that tuning can be watched without an index. ``train`` is made from documents without a golden
question in either split: questions generated from a chunk's sentences by ``stages.nano.questions``,
shown with that chunk and two neighbours of the same source, and some without it, which are to be
refused. A document, a question or an answer that stands in two splits would let the model be
examined on what it was taught, so it is an error that names every one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Chunk, Document, Example, Passage, Question
from stages import harness, tables
from stages.leakage import leakage
from stages.nano import batches, layout, words

SPLITS = ("train", "dev", "test")
PER_CONTEXT = 8  # training questions that share their passages: packed, they cost one context
GUIDE_SHARE = 0.5  # of training contexts from Markdown documents, however few: the house style


@dataclass(frozen=True)
class Shown(batches.Passage):
    """A chunk that may be shown."""

    chunk_id: str = ""
    path: str = ""
    document: str = ""


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the three splits; returns their counts."""
    documents = read_documents(paths.documents)
    golden = read_golden(paths.golden)
    check_documents(golden, documents, str(paths.golden))
    knobs = params.examples
    rows = {split: [golden_example(q) for q in golden if q.split == split] for split in SPLITS[1:]}
    chunks = tables.read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    rows["dev"] = with_passages(rows["dev"], documents, chunks, knobs.seed)
    known = {q.document for q in golden if q.document}
    free = [doc for doc in documents if name_of(doc) not in known]
    train = training(free, chunks, golden, knobs.train, knobs.unanswerable, knobs.seed)
    rows["train"] = without_leaks(train, golden)
    if params.answers.sentences is not None:
        for split in ("train", "dev"):
            rows[split] = narrowed(rows[split], chunks, params)
    refuse_leaks(rows)
    write(paths.out, rows)
    counts = {split: float(len(rows[split])) for split in SPLITS}
    refusals = sum(not row.answerable for row in rows["train"])
    harness.progress(
        f"examples: {len(rows['train'])} train ({refusals} to refuse) from {len(free)} documents, "
        f"{len(rows['dev'])} dev, {len(rows['test'])} test; "
        f"{len(train) - len(rows['train'])} dropped for being too like a golden question"
    )
    return counts | {
        "train_documents": float(len({row.document for row in rows["train"] if row.document})),
        "train_unanswerable": float(refusals),
    }


def read_documents(path: Path) -> list[Document]:
    """Accepted documents, in file order."""
    rows = tables.read_table(path, list(Document.model_fields)).to_pylist()
    return [Document.model_validate(row) for row in rows]


def read_golden(path: Path) -> list[Question]:
    """The golden questions, by id. Raises InputError naming every entry that is wrong."""
    import yaml
    from pydantic import ValidationError

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The golden questions cannot be read: {error}", where=str(path)) from None
    found, offenders = [], []
    for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        try:
            found.append(Question.model_validate(entry))
        except ValidationError as error:
            name = entry.get("id") if isinstance(entry, dict) else None
            problem = error.errors()[0]
            spot = ".".join(map(str, problem["loc"]))
            offenders.append(f"entry {number} ({name}): {spot}: {problem['msg']}")
    if not found and not offenders:
        offenders.append("the file holds no list of questions")
    if offenders:
        raise InputError(
            "The golden questions cannot be used.",
            where=str(path),
            offenders=offenders,
            next="the comment at the top of the file says what an entry has",
        )
    return sorted(found, key=lambda question: question.id)


def name_of(document: Document) -> str:
    """How golden questions name a document: its path in this repository, else its id."""
    return document.git_path or document.doc_id


def check_documents(golden: Sequence[Question], documents: Sequence[Document], where: str) -> None:
    """Raises InputError for questions whose document or answer is not there any more."""
    texts = {name_of(doc): layout.normal(doc.text) for doc in documents}
    offenders = []
    for question in golden:
        if question.document is None:
            continue
        text = texts.get(question.document)
        if text is None:
            offenders.append(f"{question.id}: no accepted document {question.document}")
        elif question.answer and layout.normal(question.answer) not in text:
            offenders.append(f"{question.id}: its answer does not stand in {question.document}")
    if offenders:
        raise InputError(
            "Golden questions point at text that is not there.",
            where=where,
            offenders=offenders,
            next="copy the sentence from the document, or see data/quality/report.html",
        )


def golden_example(question: Question) -> Example:
    return Example(
        id=question.id,
        split=question.split,
        question=question.question,
        document=question.document,
        section=question.section,
        answer=question.answer,
        passages=None,
        answerable=question.answerable,
    )


def training(
    documents: Sequence[Document],
    chunks: Sequence[dict[str, Any]],
    golden: Sequence[Question],
    count: int,
    unanswerable: float,
    seed: int,
) -> list[Example]:
    """``count`` generated examples from chunks of ``documents`` alone.

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
        items = maker.items(shown, hidden, rng, PER_CONTEXT, unanswerable)
        for item in items[: count - len(made)]:
            example = _example(f"train-{attempt:05d}-{len(made):05d}", item, shown)
            if example and not taken & {
                layout.normal(example.question),
                layout.normal(example.answer or ""),
            }:
                taken.add(layout.normal(example.question))
                made.append(example)
    return made


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


def with_passages(
    rows: Sequence[Example],
    documents: Sequence[Document],
    chunks: Iterable[dict[str, Any]],
    seed: int,
) -> list[Example]:
    """Each row with its answer's chunk and the two chunks of the guide most like the question.

    Rows whose answer no single chunk holds keep ``passages`` None.
    """
    guide = [one for found in shown_chunks(documents, chunks)[0] for one in found]
    rarity_of = words.rarity(one.text for one in guide)
    stems = [set(words.stems(f"{one.heading} {one.text}")) for one in guide]
    maker = batches.Maker([guide], rarity_of)
    rng = random.Random(f"{seed}/dev")
    out = []
    for row in rows:
        asked = set(words.stems(row.question))
        order = sorted(range(len(guide)), key=lambda at: (-maker.cover(asked, stems[at]), at))
        ranked = [guide[at] for at in order]
        wanted = layout.normal(row.answer) if row.answer else None
        gold = [
            one
            for one in ranked
            if wanted and one.document == row.document and wanted in layout.normal(one.text)
        ][:1]
        if wanted and not gold:
            out.append(row)
            continue
        others = [one for one in ranked if not wanted or wanted not in layout.normal(one.text)]
        shown = gold + others[: 3 - len(gold)]
        rng.shuffle(shown)
        passages = [_passage(one, n) for n, one in enumerate(shown, start=1)]
        out.append(row.model_copy(update={"passages": passages}))
    return out


def narrowed(
    rows: Sequence[Example], chunks: Iterable[dict[str, Any]], params: Params
) -> list[Example]:
    """Rows whose passages are what :class:`resources.rag.Rag` would show of their chunks.

    A row that is shown nothing teaches nothing (it is refused without a model), and one whose
    answer is not among the sentences would teach to make one up; both are left out. A dev row
    without passages stays as it is.
    """
    from contracts.settings import Settings
    from resources import rag
    from resources.embedding import open_embedder

    block, knobs = params.vectors, params.answers
    embedder = open_embedder(block, Settings.from_env().embeddings_dir, device="cpu")
    by_id = {row["chunk_id"]: Chunk.model_validate(row) for row in chunks}
    shown = [row for row in rows if row.passages]
    found = rag.narrow(
        embedder.embed([row.question for row in shown]),
        [[by_id[passage.chunk_id] for passage in row.passages or []] for row in shown],
        embedder,
        knobs.sentences or 1,
        knobs.min_score,
    )
    passages = {row.id: kept for row, kept in zip(shown, found, strict=True)}
    out = []
    for row in rows:
        kept = passages.get(row.id)
        if kept is None:
            out.append(row)
        elif kept and (row.answer is None or any(row.answer in one.text for one in kept)):
            out.append(row.model_copy(update={"passages": kept}))
    return out


def _passage(one: Shown, n: int) -> Passage:
    return Passage(
        n=n,
        chunk_id=one.chunk_id,
        path=one.path,
        title=one.title,
        heading=one.heading,
        text=one.text,
        score=0.0,  # not from a search
    )


def _example(name: str, item: batches.Item, shown: Sequence[Any]) -> Example | None:
    """The record of one generated question; None where its answer is no verbatim text."""
    label, _, line = item.target.partition(" ")
    passages = [_passage(one, one.n) for one in shown]
    if label == layout.REFUSE:
        return Example(
            id=name, split="train", question=item.question, document=None, section=None,
            answer=None, passages=passages, answerable=False,
        )  # fmt: skip
    source = shown[int(label[1]) - 1]
    answer = " ".join(line.rpartition(" [")[0].split())
    if answer not in source.text:
        return None
    return Example(
        id=name, split="train", question=item.question, document=source.document,
        section=source.heading, answer=answer, passages=passages, answerable=True,
    )  # fmt: skip


def without_leaks(train: list[Example], golden: Sequence[Question]) -> list[Example]:
    """Training rows whose question does not give away a golden one (``stages.leakage``).

    They are generated, so the ones that do are dropped; nobody could move them.
    """
    found = leakage({q.id: q.question for q in golden}, {row.id: row.question for row in train})
    leaking = {key for key, _ in found}
    return [row for row in train if row.id not in leaking]


def refuse_leaks(rows: dict[str, list[Example]]) -> None:
    """Raises InputError listing every document, question and answer that two splits share."""
    seen: dict[tuple[str, str], dict[str, list[str]]] = {}
    for split in SPLITS:
        for row in rows[split]:
            for kind, value in _identities(row):
                seen.setdefault((kind, value), {}).setdefault(split, []).append(row.id)
    offenders = [
        f"{kind} {value!r}: "
        + "; ".join(f"{split}: {', '.join(sorted(set(ids))[:5])}" for split, ids in where.items())
        for (kind, value), where in sorted(seen.items())
        if len(where) > 1
    ]
    if offenders:
        raise InputError(
            "Examples leak from one split into another.",
            offenders=offenders,
            next="move all questions of a document to one split in data/golden/questions.yaml",
        )


def _identities(row: Example) -> list[tuple[str, str]]:
    """What must not be met again in another split."""
    found = [("question", layout.normal(row.question))]
    if row.document:
        found.append(("document", row.document))
    if row.answer:
        found.append(("answer", layout.normal(row.answer)))
    return found


def write(out: Path, rows: dict[str, list[Example]]) -> None:
    """The files of the three splits, then the manifest that counts them."""
    harness.fresh_dir(out)
    for split in SPLITS:
        text = "".join(row.model_dump_json() + "\n" for row in rows[split])
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    harness.write_json(out / "manifest.json", {split: len(rows[split]) for split in SPLITS})


if __name__ == "__main__":
    harness.main("examples", run, paths=("documents", "chunks", "golden", "out"))
