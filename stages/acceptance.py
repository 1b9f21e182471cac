"""acceptance: whether the chunks are sound, and a profile to compare versions by.

In: the accepted documents and their chunks. Out: a folder with

    profile.json         counts and distributions, a few kilobytes
    report.json/.html    every expectation with what was observed; written last

A Great Expectations suite over the chunks: contract, uniqueness, tokens, digests, offsets,
coverage. If one does not hold, the stage fails after the report is written. How far all has moved
since the version published last is asked when it is published (assets/publishing.py): it depends on
what is live, not on files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.digests import text_sha
from contracts.errors import QualityError
from contracts.params import Params
from contracts.records import Chunk
from stages import harness
from stages.acceptance_profile import profile
from stages.expectations import validate
from stages.tables import read_table

Row = dict[str, Any]
DOCUMENT_COLUMNS = ("doc_id", "source", "format", "language", "text")


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    documents = read_table(paths.documents / "documents.parquet", DOCUMENT_COLUMNS).to_pylist()
    chunks = read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    now = profile(documents, chunks, params.chunks.max_tokens, params.chunks.strategy)
    results = judge(documents, chunks, params.chunks.max_tokens)
    write_output(paths.out, now, results)
    failed = [row for row in results if not row["success"]]
    harness.progress(
        f"{len(chunks)} chunks of {len(documents)} documents: "
        f"{len(results) - len(failed)} of {len(results)} expectations hold"
    )
    if failed:
        raise QualityError(
            f"{len(failed)} of {len(results)} expectations over the chunks do not hold.",
            offenders=[f"{row['expectation']}: {row['observed']}" for row in failed],
            where=str(paths.out / "report.html"),
            next="run the stages quality and chunks again",
        )
    return {"expectations": float(len(results)), "chunks": float(len(chunks))}


def judge(documents: list[Row], chunks: list[Row], max_tokens: int) -> list[Row]:
    """The results of the suites over the chunks, and over the documents that they come from."""
    import great_expectations.expectations as gxe
    import pandas as pd

    texts = {row["doc_id"]: row["text"] for row in documents}
    frame = pd.DataFrame(chunks, columns=list(Chunk.model_fields))
    faults = {name: find(chunks, texts) for name, find in FAULTS.items()}
    columns = list(Chunk.model_fields)
    required = [name for name in columns if name != "licence"]
    suite = [
        (
            "exactly the columns of a Chunk",
            gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True),
        ),
        ("chunk_id is unique", gxe.ExpectColumnValuesToBeUnique(column="chunk_id")),
        (
            f"tokens are 1 to {max_tokens}",
            gxe.ExpectColumnValuesToBeBetween(column="tokens", min_value=1, max_value=max_tokens),
        ),
        ("text is not blank", gxe.ExpectColumnValuesToMatchRegex(column="text", regex=r"\S")),
        *(
            (f"{name} is never missing", gxe.ExpectColumnValuesToNotBeNull(column=name))
            for name in required
        ),
    ]
    spans = [(name, gxe.ExpectColumnValuesToBeNull(column=name)) for name in faults]
    whole = [
        (
            "every non-space character of a document stands in a chunk",
            gxe.ExpectColumnValuesToBeNull(column="lost"),
        )
    ]
    covered = pd.DataFrame({"lost": uncovered(texts, chunks)})
    return validate(
        {
            "chunks": (frame, suite),
            "spans": (pd.DataFrame(faults), spans),
            "documents": (covered, whole),
        }
    )


def _wrong_sha(chunks: list[Row], texts: Mapping[str, str]) -> list[str | None]:
    return [_name(row, row["text_sha"] != text_sha(row["text"] or "")) for row in chunks]


def _not_the_span(chunks: list[Row], texts: Mapping[str, str]) -> list[str | None]:
    return [
        _name(row, texts.get(row["doc_id"], "")[row["start"] : row["end"]] != row["text"])
        for row in chunks
    ]


def _not_in_order(chunks: list[Row], texts: Mapping[str, str]) -> list[str | None]:
    return [
        _name(row, before is not None and row["start"] <= before["start"])
        for before, row in _with_previous(chunks)
    ]


def _contained(chunks: list[Row], texts: Mapping[str, str]) -> list[str | None]:
    return [
        _name(
            row,
            before is not None and (row["end"] <= before["end"] or row["start"] <= before["start"]),
        )
        for before, row in _with_previous(chunks)
    ]


#: In words -> the chunk's name where it does not hold, else None; in the order of the chunks.
FAULTS = {
    "text_sha is of the text": _wrong_sha,
    "text is document[start:end]": _not_the_span,
    "chunks of a document stand in order": _not_in_order,
    "no chunk is contained in its neighbour": _contained,
}


def _with_previous(chunks: list[Row]) -> list[tuple[Row | None, Row]]:
    """Each chunk with the one before it in the same document."""
    last: dict[str, Row] = {}
    pairs = []
    for row in chunks:
        pairs.append((last.get(row["doc_id"]), row))
        last[row["doc_id"]] = row
    return pairs


def _name(row: Row, wrong: bool) -> str | None:
    return str(row["chunk_id"]) if wrong else None


def uncovered(texts: Mapping[str, str], chunks: Sequence[Row]) -> list[str | None]:
    """For each document: None, or its name and how many non-space characters no chunk holds."""
    done = dict.fromkeys(texts, 0)
    lost = dict.fromkeys(texts, 0)
    for row in sorted(chunks, key=lambda item: (item["doc_id"], item["start"])):
        key = row["doc_id"]
        if key in texts:
            lost[key] += _signs(texts[key][done[key] : row["start"]])
            done[key] = max(done[key], row["end"])
    for key, text in texts.items():
        lost[key] += _signs(text[done[key] :])
    return [f"{key}: {count:,} characters" if count else None for key, count in lost.items()]


def _signs(text: str) -> int:
    """Non-space characters."""
    return sum(map(len, text.split()))


def write_output(out: Path, now: Row, results: list[Row]) -> None:
    """Everything that the stage writes; the report comes last."""
    from stages.acceptance_report import page

    harness.fresh_dir(out)
    harness.write_json(out / "profile.json", now)
    report = {"success": all(row["success"] for row in results), "expectations": results}
    (out / "report.html").write_text(page(report, None, now), encoding="utf-8")
    harness.write_json(out / "report.json", report)


if __name__ == "__main__":
    harness.main("acceptance", run, paths=("documents", "chunks", "out"))
