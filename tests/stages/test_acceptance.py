"""Acceptance: broken chunks and sudden changes block, ordinary edits and new sources do not."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.digests import dir_md5, text_sha
from contracts.errors import QualityError
from contracts.params import load_params
from contracts.records import Chunk
from stages import acceptance
from stages.acceptance_profile import compare, g_test, js_distance, profile
from stages.document_table import document_row, schema
from stages.tables import write_rows, write_table

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
LIMIT = PARAMS.chunks.max_tokens

Row = dict[str, Any]


def document(number: int, source: str = "docs", words: int = 40, language: str = "en") -> Row:
    text = " ".join(f"word{number}x{n}" for n in range(words))
    return document_row(source, f"{number}.md", text=text, language=language, format="markdown")


def chunk(row: Row, start: int, end: int) -> Row:
    text = row["text"][start:end]
    return {
        "chunk_id": f"{row['doc_id']}#{start}-{end}",
        **{key: row[key] for key in ("doc_id", "source", "path", "title", "format", "language")},
        "licence": None,
        "heading": "",
        "start": start,
        "end": end,
        "tokens": max(1, len(text.split())),
        "text_sha": text_sha(text),
        "text": text,
    }


def cut(row: Row) -> list[Row]:
    """Two chunks that meet at a space."""
    middle = row["text"].index(" ", len(row["text"]) // 2)
    return [chunk(row, 0, middle), chunk(row, middle + 1, len(row["text"]))]


def run(
    tmp_path: Path, documents: list[Row], chunks: list[Row] | None = None, **policy: Any
) -> dict[str, float]:
    import pyarrow as pa

    chunks = [item for row in documents for item in cut(row)] if chunks is None else chunks
    kept = schema().remove(schema().get_field_index("problem"))
    rows = [{key: value for key, value in row.items() if key != "problem"} for row in documents]
    write_rows(tmp_path / "data" / "quality" / "documents.parquet", rows, kept)
    columns = {name: [row[name] for row in chunks] for name in Chunk.model_fields}
    write_table(tmp_path / "data" / "chunks.parquet", pa.table(columns))
    paths = SimpleNamespace(
        documents=tmp_path / "data" / "quality",
        chunks=tmp_path / "data" / "chunks.parquet",
        out=tmp_path / "data" / "acceptance",
    )
    return acceptance.run(paths, PARAMS)


def test_sound_chunks_pass_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    documents = [document(n) for n in range(30)]
    metrics = run(tmp_path, documents)
    assert metrics["chunks"] == sum(len(cut(row)) for row in documents)
    profiled = json.loads((tmp_path / "data" / "acceptance" / "profile.json").read_text())
    assert profiled["sources"]["docs"]["documents"] == 30
    page = (tmp_path / "data" / "acceptance" / "report.html").read_text()
    assert "PASS" in page and "data:image/png;base64," in page and "https://" not in page
    before = dir_md5(tmp_path / "data" / "acceptance")
    run(tmp_path, documents)
    assert dir_md5(tmp_path / "data" / "acceptance") == before
    run(tmp_path, documents[1:])
    assert dir_md5(tmp_path / "data" / "acceptance") != before


def _twice(chunks: list[Row]) -> None:
    chunks[1]["chunk_id"] = chunks[0]["chunk_id"]


def _too_long(chunks: list[Row]) -> None:
    chunks[3]["tokens"] = LIMIT + 1


def _sha(chunks: list[Row]) -> None:
    chunks[0]["text_sha"] = text_sha("another")


def _other_text(chunks: list[Row]) -> None:
    chunks[2]["text"] = chunks[2]["text"].upper()
    chunks[2]["text_sha"] = text_sha(chunks[2]["text"])


def _contained(chunks: list[Row]) -> None:
    row = {**chunks[0], "end": chunks[0]["end"], "start": 4, "chunk_id": "inside"}
    row["text"] = chunks[0]["text"][4:]
    chunks.insert(1, {**row, "text_sha": text_sha(row["text"])})


def _disorder(chunks: list[Row]) -> None:
    chunks[0], chunks[1] = chunks[1], chunks[0]


def _lost(chunks: list[Row]) -> None:
    del chunks[5]


def _blank(chunks: list[Row]) -> None:
    chunks[1]["text"] = " \n"


def _no_title(chunks: list[Row]) -> None:
    chunks[1]["title"] = None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_twice, "chunk_id is unique: 2 of 20 rows do not"),
        (_too_long, f"tokens are 1 to {LIMIT}: 1 of 20 rows do not, e.g. {LIMIT + 1}"),
        (_sha, "text_sha is of the text: 1 of 20 rows do not, e.g. 'docs:0.md#0-"),
        (_other_text, "text is document[start:end]: 1 of 20"),
        (_contained, "no chunk is contained in its neighbour: 1 of 21 rows do not, e.g. 'inside'"),
        (_disorder, "chunks of a document stand in order: 1 of 20"),
        (_lost, "every non-space character of a document stands in a chunk: 1 of 10"),
        (_blank, "text is not blank: 1 of 20"),
        (_no_title, "title is never missing: 1 of 20"),
    ],
)
def test_each_broken_promise_of_a_chunk_is_seen_by_name(damage: Any, words: str) -> None:
    documents = [document(n) for n in range(10)]
    chunks = [item for row in documents for item in cut(row)]
    damage(chunks)
    rows = acceptance.judge(documents, chunks, LIMIT)
    offenders = [f"{row['expectation']}: {row['observed']}" for row in rows if not row["success"]]
    assert any(words in item for item in offenders), offenders


def test_broken_chunks_block_after_the_report(tmp_path: Path) -> None:
    documents = [document(n) for n in range(10)]
    chunks = [item for row in documents for item in cut(row)]
    _lost(chunks)
    with pytest.raises(QualityError, match="1 of 22 expectations"):
        run(tmp_path, documents, chunks)
    report = json.loads((tmp_path / "data" / "acceptance" / "report.json").read_text())
    assert report["success"] is False
    assert "FAIL" in (tmp_path / "data" / "acceptance" / "report.html").read_text()


def value(rows: list[Row], limit: int = LIMIT) -> Row:
    return profile(rows, [item for row in rows for item in cut(row)], limit, "structure")


def failed(before: list[Row], now: list[Row]) -> list[str]:
    rows = compare(value(before), value(now), PARAMS.acceptance)
    return [row["expectation"] for row in rows if not row["success"]]


def test_shifts_of_language_length_and_source_are_seen() -> None:
    old = [document(n) for n in range(200)]
    foreign = [document(n, language="de" if n < 20 else "en") for n in range(200)]
    longer = [document(n, words=40 if n < 140 else 300) for n in range(200)]
    assert failed(old, foreign) == ["languages are distributed as before"]
    assert "characters of a document are distributed as before" in failed(old, longer)
    both = [*old, *(document(n, "api") for n in range(200))]
    moved = [*old, *(document(n, "api") for n in range(590))]
    assert failed(both, moved) == ["shares of the sources are distributed as before"]


def test_other_chunking_is_no_shift_of_tokens() -> None:
    old, new = value([document(0)], 128), value([document(0)], 64)
    rows = compare(old, new, PARAMS.acceptance)
    assert not any("tokens" in row["expectation"] for row in rows)


def test_versions_drawn_alike_pass_and_a_real_shift_fails() -> None:
    """500 pairs of 100 to 3,000 documents: at most 1 % false alarms; a shift of 30 % is caught."""
    rng = random.Random(7)
    false = caught = 0
    weights = [1, 3, 9, 14, 10, 5, 2, 1]
    moved = [1, 2, 5, 8, 8, 12, 8, 4]
    for _ in range(500):
        n, m = rng.randint(100, 3000), rng.randint(100, 3000)
        old = Counter(map(str, rng.choices(range(8), weights, k=n)))
        new = Counter(map(str, rng.choices(range(8), weights, k=m)))
        other = Counter(map(str, rng.choices(range(8), moved, k=max(300, m))))
        false += js_distance(old, new) >= 0.15 and g_test(old, new) < 0.001
        caught += js_distance(old, other) >= 0.15 and g_test(old, other) < 0.001
    assert false <= 5 and caught >= 475, (false, caught)


def test_the_two_statistics_are_what_scipy_says() -> None:
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import chi2_contingency

    old, new = {"a": 50, "b": 30, "c": 20}, {"a": 80, "b": 90, "c": 30}
    expected = jensenshannon([0.5, 0.3, 0.2], [0.4, 0.45, 0.15], base=2)
    assert js_distance(old, new) == pytest.approx(expected)
    table = [list(old.values()), list(new.values())]
    assert g_test(old, new) == pytest.approx(
        chi2_contingency(table, lambda_="log-likelihood").pvalue
    )
    assert js_distance(old, {}) == 0 and g_test(old, {}) == 1 and g_test({"a": 9}, {"a": 7}) == 1
