"""retrieval: how well the index finds what the golden dev questions need.

In: the index, the golden questions (only ``split: dev``: the test split belongs to the gate). Out:
a folder with report.json, report.html, retrieval.png and questions.parquet (one row a question).

What counts. The right *section* of a question is what stands below its heading in its document; a
chunk belongs to it when it comes from that document and the heading stands in its heading path, or
when it holds the answer. ``recall_at_k`` is the share of questions with such a chunk among the
first k; ``answer_at_k`` asks for more: the answer itself, whole and verbatim up to white space,
within the first k chunks, which is what a model that copies can use. ``mrr`` is the mean of
1 / rank of the first right chunk among the first 10. ``ndcg_at_10`` counts every chunk of the right
section once, against the best order there is. Intervals: 95 % percentile bootstrap over questions.

Below ``retrieval.min_recall`` at the last of ``retrieval.top_k`` the stage fails, after its report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import InputError, QualityError
from contracts.params import Params
from contracts.records import Chunk, Question
from contracts.settings import Settings
from resources.embedding import Embedder
from resources.index import EdgeIndex, Hit, open_index
from stages import harness
from stages.tables import write_table

if TYPE_CHECKING:
    import pyarrow as pa

DEPTH = 10  # hits that nDCG and MRR look at
RESAMPLES, SEED = 2000, 7


@dataclass(frozen=True)
class Result:
    """One question: its hits, and which are right."""

    question: Question
    hits: list[Hit]
    in_section: list[bool]
    has_answer: list[bool]
    relevant: int  # chunks of the right section in the whole index


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    questions = [item for item in read_questions(paths.golden) if item.split == "dev"]
    vectors = params.vectors
    embedder = Embedder(vectors.model, vectors.dtype, Settings.from_env().embeddings_dir)
    folders = {key: source.uri for key, source in params.documents.sources.items()}
    with open_index(paths.index) as index:
        check_model(index, embedder)
        results = ask(questions, index, embedder, folders, max(DEPTH, *params.retrieval.top_k))
        recall = index.manifest.get("recall", {})
    metrics, intervals = summarise(results, params.retrieval.top_k)
    write_output(paths.out, results, metrics, intervals, recall, params)
    headline = f"recall_at_{params.retrieval.top_k[-1]}"
    harness.progress(
        f"{int(metrics['questions'])} dev questions: "
        + ", ".join(f"{name} {metrics[name]:.3f}" for name in (headline, "ndcg_at_10", "mrr"))
    )
    if metrics[headline] < params.retrieval.min_recall:
        missed = [result for result in results if result.relevant and not any(result.in_section)]
        raise QualityError(
            f"{headline} is {metrics[headline]:.3f}; {params.retrieval.min_recall} is the floor.",
            offenders=[f"{item.question.id}: {item.question.question}" for item in missed],
            where=str(paths.out / "report.html"),
            next="read the missed questions in the report; params.yaml: retrieval.min_recall",
        )
    return metrics


def read_questions(path: Path) -> list[Question]:
    """The golden questions, in file order. Raises InputError listing every offender."""
    import yaml
    from pydantic import ValidationError

    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"The golden questions cannot be read: {error}", where=str(path)) from None
    questions: list[Question] = []
    wrong: list[str] = []
    for number, item in enumerate(items if isinstance(items, list) else [items]):
        try:
            questions.append(Question.model_validate(item))
        except ValidationError as error:
            name = item.get("id", number) if isinstance(item, dict) else number
            wrong += [f"{name}: {part['loc']}: {part['msg']}" for part in error.errors()]
    ids = [question.id for question in questions]
    wrong += sorted({f"{name}: this id stands twice" for name in ids if ids.count(name) > 1})
    if wrong or not questions:
        raise InputError("The golden questions are damaged.", offenders=wrong, where=str(path))
    return questions


def check_model(index: EdgeIndex, embedder: Embedder) -> None:
    """Questions must be embedded by the model that embedded the chunks."""
    model = index.manifest["model"]
    if model["digest"] != embedder.digest:
        raise InputError(
            f"The index was made with {model['name']} ({model['dtype']}, {model['digest'][:12]}), "
            f"the questions would be embedded with {embedder.model} ({embedder.dtype}, "
            f"{embedder.digest[:12]}).",
            where="params.yaml: vectors",
            next="run the stages vectors and index again",
        )


def ask(
    questions: Sequence[Question],
    index: EdgeIndex,
    embedder: Embedder,
    folders: dict[str, str],
    depth: int,
) -> list[Result]:
    """Search for every question. Raises InputError when a question's section is not indexed."""
    chunks = list(index.chunks())
    relevant = {item.id: _relevant(item, chunks, folders) for item in questions if item.answerable}
    lost = [
        f"{item.id}: {item.document} > {item.section}"
        for item in questions
        if item.answerable and not relevant[item.id]
    ]
    if lost:
        raise InputError(
            "Golden questions name sections that the index does not hold.",
            offenders=lost,
            where="data/golden/questions.yaml",
            next="correct document and section, or look for the document in data/quality",
        )
    vectors = embedder.embed_questions([item.question for item in questions])
    results = []
    for item, vector in zip(questions, vectors, strict=True):
        hits = index.search(vector, depth)
        results.append(
            Result(
                item,
                hits,
                [in_section(item, hit.chunk, folders) for hit in hits],
                [has_answer(item, hit.chunk, folders) for hit in hits],
                len(relevant.get(item.id, [])),
            )
        )
    return results


def _relevant(item: Question, chunks: Iterable[Chunk], folders: dict[str, str]) -> list[Chunk]:
    return [chunk for chunk in chunks if in_section(item, chunk, folders)]


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


def summarise(
    results: Sequence[Result], top_k: Sequence[int]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means over the answerable questions, and their 95 % bootstrap intervals."""
    import numpy as np

    rows = [scores(result, top_k) for result in results if result.question.answerable]
    if not rows:
        raise InputError("There is no answerable dev question.", where="data/golden/questions.yaml")
    metrics: dict[str, float] = {"questions": float(len(rows))}
    intervals: dict[str, tuple[float, float]] = {}
    draws = np.random.default_rng(SEED).integers(0, len(rows), (RESAMPLES, len(rows)))
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        metrics[name] = round(float(values.mean()), 6)
        intervals[name] = (round(float(low), 6), round(float(high), 6))
    return metrics, intervals


def write_output(
    out: Path,
    results: Sequence[Result],
    metrics: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    recall: dict[str, float],
    params: Params,
) -> None:
    """Everything that the stage writes; the JSON report comes last."""
    from stages.retrieval_report import page, picture

    harness.fresh_dir(out)
    write_table(out / "questions.parquet", _table(results, params.retrieval.top_k))
    png = picture(results, metrics, intervals, params.retrieval.top_k)
    (out / "retrieval.png").write_bytes(png)
    report = {
        "metrics": metrics,
        "intervals": {name: list(pair) for name, pair in intervals.items()},
        "floor": {f"recall_at_{params.retrieval.top_k[-1]}": params.retrieval.min_recall},
        "against_exact_search": recall,
        "missed": [
            item.question.id for item in results if item.relevant and not any(item.in_section)
        ],
    }
    (out / "report.html").write_text(page(report, results, png), encoding="utf-8")
    harness.write_json(out / "report.json", report)


def _table(results: Sequence[Result], top_k: Sequence[int]) -> pa.Table:
    """One row a question: what was asked, what came, how it scored."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for result in results:
        item = result.question
        row: dict[str, Any] = {
            "id": item.id,
            "question": item.question,
            "document": item.document,
            "section": item.section,
            "answerable": item.answerable,
            "chunk_ids": [hit.chunk.chunk_id for hit in result.hits],
            "scores": [round(hit.score, 6) for hit in result.hits],
            "in_section": result.in_section,
        }
        if item.answerable:
            row |= scores(result, top_k)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


if __name__ == "__main__":
    harness.main("retrieval", run, paths=("index", "golden", "out"))
