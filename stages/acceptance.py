"""acceptance: whether this knowledge base may take the place of the one that is published.

In: the accepted documents, their chunks, ``data/accepted.json`` (the profile of the version that
was published last, kept in git; ``null`` at first). Out: a folder with

    profile.json         counts and distributions: what accepted.json becomes
    report.json/.html    every expectation and comparison with what was observed; written last

A Great Expectations suite over the chunks (contract, uniqueness, tokens, digests, offsets,
coverage), then the comparison with the last accepted version (stages/acceptance_profile.py). If one
does not hold, the stage fails after the report is written. To let a change through on purpose,
write ``null`` into data/accepted.json and commit that. When a version has been published,
:func:`accept` makes its profile the one to compare with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.digests import text_sha
from contracts.errors import InputError, QualityError
from contracts.params import Params
from contracts.records import Chunk
from stages import harness
from stages.acceptance_profile import compare, profile
from stages.expectations import validate
from stages.tables import read_table

Row = dict[str, Any]
DOCUMENT_COLUMNS = ("doc_id", "source", "format", "language", "text")


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    documents = read_table(paths.documents / "documents.parquet", DOCUMENT_COLUMNS).to_pylist()
    chunks = read_table(paths.chunks, list(Chunk.model_fields)).to_pylist()
    before = read_accepted(paths.accepted)
    now = profile(documents, chunks, params.chunks.max_tokens, params.chunks.strategy)
    results = judge(documents, chunks, params.chunks.max_tokens)
    results += compare(before, now, params.acceptance)
    write_output(paths.out, before, now, results)
    failed = [row for row in results if not row["success"]]
    harness.progress(
        f"{len(chunks)} chunks of {len(documents)} documents: "
        f"{len(results) - len(failed)} of {len(results)} expectations hold, "
        f"compared with {'nothing: the first version' if before is None else 'the last accepted'}"
    )
    if failed:
        raise QualityError(
            f"{len(failed)} of {len(results)} expectations over the chunks do not hold.",
            offenders=[f"{row['expectation']}: {row['observed']}" for row in failed],
            where=str(paths.out / "report.html"),
            next="mend the documents, change params.yaml: acceptance, or, if the change is meant, "
            f"write null into {paths.accepted}",
        )
    shifts = [row["shift"] for row in results if row.get("shift") is not None]
    return {
        "expectations": float(len(results)),
        "compared": float(before is not None),
        "max_shift": max(shifts, default=0.0),
    }


def read_accepted(path: Path) -> Row | None:
    """The profile of the version that was published last, or None. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The last accepted profile cannot be read: {error}", where=str(path), next="write null"
        ) from None
    if value is not None and not (
        isinstance(value, dict) and {"sources", "chunking"} <= set(value)
    ):
        raise InputError(
            "The last accepted profile is not one.",
            where=str(path),
            next="write null, or restore it: git checkout -- data/accepted.json",
        )
    return value


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


def write_output(out: Path, before: Row | None, now: Row, results: list[Row]) -> None:
    """Everything that the stage writes; the report comes last."""
    from stages.acceptance_report import page

    harness.fresh_dir(out)
    harness.write_json(out / "profile.json", now)
    report = {
        "success": all(row["success"] for row in results),
        "compared": before is not None,
        "expectations": results,
    }
    (out / "report.html").write_text(page(report, before, now), encoding="utf-8")
    harness.write_json(out / "report.json", report)


def accept(root: Path) -> bool:
    """Make the profile of data/acceptance the one that later versions are compared with.

    To be called when its version has been published. Returns whether data/accepted.json changed.
    Raises InputError if there is no profile, QualityError if its report says that it failed.
    """
    folder, target = root / "data" / "acceptance", root / "data" / "accepted.json"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        now = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no accepted profile: {error}", where=str(folder), next="dvc repro acceptance"
        ) from None
    if not report["success"]:
        raise QualityError(
            "A knowledge base that was not accepted cannot become the one to compare with.",
            where=str(folder / "report.html"),
        )
    if target.is_file() and read_accepted(target) == now:
        return False
    harness.write_json(target, now)
    return True


if __name__ == "__main__":
    harness.main("acceptance", run, paths=("documents", "chunks", "accepted", "out"))
