"""examples: what the adapter learns from and what the gate judges by, split by document.

In: accepted documents, their chunks, the golden questions. Out: ``train.jsonl``, ``dev.jsonl``,
``test.jsonl``, ``reserve.jsonl`` (rows are ``contracts.records.Example``) and ``manifest.json``,
written last.

``dev`` and ``test`` are the golden questions of their split. Passages of ``test`` are retrieved
when it is answered; ``dev`` is shown the chunk that holds the answer and the two most alike others,
so that tuning can be watched without an index. ``train`` is made from documents without a golden
question in either split: questions generated from a chunk's sentences by ``stages.nano.questions``,
shown with that chunk and two neighbours of the same source, and some without it, which are to be
refused. ``reserve`` is what the gate draws when it is undecided: questions generated in the same
way, all answerable, from documents that no other split shows, in a fixed order. A document, a
question or an answer that stands in two splits would let the model be examined on what it was
taught, so it is an error that names every one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Chunk, Document, Example, Question
from stages import harness, tables
from stages.generated import identities, name_of, passage, reserve, shown_chunks, training
from stages.leakage import leakage
from stages.nano import batches, layout, words

SPLITS = ("train", "dev", "test", "reserve")
GOLDEN = ("dev", "test")


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the four splits; returns their counts."""
    documents = read_documents(paths.documents)
    golden = read_golden(paths.golden)
    check_documents(golden, documents, str(paths.golden))
    knobs = params.examples
    rows = {split: [golden_example(q) for q in golden if q.split == split] for split in GOLDEN}
    chunks = tables.read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    rows["dev"] = with_passages(rows["dev"], documents, chunks, knobs.seed)
    known = {q.document for q in golden if q.document}
    free = [doc for doc in documents if name_of(doc) not in known]
    train = training(free, chunks, golden, knobs.train, knobs.unanswerable, knobs.seed)
    rows["train"] = without_leaks(train, golden)
    if params.answers.sentences is not None:
        for split in ("train", "dev"):
            rows[split] = narrowed(rows[split], chunks, params)
    rows["reserve"] = reserve(free, chunks, golden, [*train, *rows["dev"]], knobs)
    refuse_leaks(rows)
    write(paths.out, rows)
    counts = {split: float(len(rows[split])) for split in SPLITS}
    refusals = sum(not row.answerable for row in rows["train"])
    harness.progress(
        f"examples: {len(rows['train'])} train ({refusals} to refuse) from {len(free)} documents, "
        f"{len(rows['dev'])} dev, {len(rows['test'])} test, {len(rows['reserve'])} reserve; "
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
        passages = [passage(one, n) for n, one in enumerate(shown, start=1)]
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
        for row in rows.get(split, []):
            for kind, value in identities(row):
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


def write(out: Path, rows: dict[str, list[Example]]) -> None:
    """The files of the four splits, then the manifest that counts them."""
    harness.fresh_dir(out)
    for split in SPLITS:
        text = "".join(row.model_dump_json() + "\n" for row in rows[split])
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    harness.write_json(out / "manifest.json", {split: len(rows[split]) for split in SPLITS})


if __name__ == "__main__":
    harness.main("examples", run, paths=("documents", "chunks", "golden", "out"))
