"""Quality: defects go to quarantine with a reason, a broken policy blocks after the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from contracts.digests import dir_md5
from contracts.errors import InputError, QualityError
from contracts.params import Params, load_params
from contracts.records import Document
from stages import quality
from stages.documents import _row, schema
from stages.tables import write_rows

ROOT = Path(__file__).parents[2]
POLICY = {"min_documents": 5, "min_characters": 20, "max_characters": 500, "max_quarantined": 0.3}


def params(**policy: Any) -> Params:
    base = load_params(ROOT / "params.yaml")
    changed = base.quality.model_copy(update={**POLICY, "min_unique_text": 0.5, **policy})
    return base.model_copy(update={"quality": changed})


def row(source: str, path: str, text: str, problem: str | None = None) -> dict[str, Any]:
    return _row(source, path, path, text.encode(), text, None, problem)


def good(count: int) -> list[dict[str, Any]]:
    texts = [f"Document number {n} has text of its own." for n in range(count)]
    return [row("docs", f"{n}.md", text) for n, text in enumerate(texts)]


def run(tmp_path: Path, rows: list[dict[str, Any]], **policy: Any) -> dict[str, float]:
    for source in {item["source"] for item in rows}:
        part = [item for item in rows if item["source"] == source]
        write_rows(tmp_path / "documents" / f"{source}.parquet", part, schema())
    paths = SimpleNamespace(documents=tmp_path / "documents", out=tmp_path / "quality")
    return quality.run(paths, params(**policy))


def read(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / "quality" / f"{name}.parquet").to_pylist()


def test_defects_and_copies_are_set_aside(tmp_path: Path) -> None:
    bad = [
        row("docs", "short.md", "Too short."),
        row("docs", "long.md", "word " * 200),
        row("docs", "binary.md", "", "binary: holds NUL bytes"),
        row("pkg", "pkg.A.copy", good(1)[0]["text"]),
    ]
    metrics = run(tmp_path, [*good(9), *bad])
    assert metrics == {
        "documents": 13,
        "accepted": 9,
        "defects": 3,
        "copies": 1,
        "expectations": 15,
    }
    accepted = [Document.model_validate(item) for item in read(tmp_path, "documents")]
    assert [item.path for item in accepted] == [f"{n}.md" for n in range(9)]
    reasons = {item["path"]: item["problem"] for item in read(tmp_path, "quarantine")}
    assert reasons == {
        "short.md": "10 characters, fewer than 20",
        "long.md": "1,000 characters, more than 500",
        "binary.md": "binary: holds NUL bytes",
        "pkg.A.copy": "copy of docs:0.md",
    }
    report = json.loads((tmp_path / "quality" / "report.json").read_text())
    assert report["success"] and all(item["success"] for item in report["expectations"])
    assert report["quarantined"] == {
        "binary": 1,
        "exact copy of another text": 1,
        "too long": 1,
        "too short": 1,
    }
    page = (tmp_path / "quality" / "report.html").read_text()
    assert "copy of docs:0.md" in page and "data:image/png;base64," in page
    assert "http://" not in page and "https://" not in page


def test_the_output_repeats_byte_for_byte(tmp_path: Path) -> None:
    rows = [*good(8), row("docs", "x.md", "short")]
    run(tmp_path, rows)
    first = dir_md5(tmp_path / "quality")
    run(tmp_path, rows)
    assert dir_md5(tmp_path / "quality") == first


def _no_title(rows: list[dict[str, Any]]) -> None:
    rows[3]["title"] = None


def _twice(rows: list[dict[str, Any]]) -> None:
    rows[3]["doc_id"] = rows[4]["doc_id"]


def _unreadable(rows: list[dict[str, Any]]) -> None:
    for item in rows[:4]:
        item.update(text="", problem="empty")


def _copies(rows: list[dict[str, Any]]) -> None:
    for item in rows[1:6]:
        item["text"] = rows[0]["text"]


def _digest(rows: list[dict[str, Any]]) -> None:
    rows[2]["md5"] = "?"


def _few(rows: list[dict[str, Any]]) -> None:
    del rows[2:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_title, "title is never missing: 1 of 8 rows"),
        (_twice, "doc_id is unique: 2 of 8 rows"),
        (_unreadable, "at most 30.0% of documents are defective: 0.5"),
        (_copies, "at least 50% of texts are distinct: 0.375"),
        (_digest, "md5 is an MD5: 1 of 8 rows do not, e.g. '?'"),
        (_few, "at least 5 documents: 2"),
    ],
)
def test_each_broken_expectation_blocks_by_name(tmp_path: Path, damage: Any, words: str) -> None:
    rows = good(8)
    damage(rows)
    with pytest.raises(QualityError) as caught:
        run(tmp_path, rows)
    assert any(words in offender for offender in caught.value.offenders), caught.value.offenders
    assert "report.html" in str(caught.value) and caught.value.exit_code == 1
    report = json.loads((tmp_path / "quality" / "report.json").read_text())
    failed = [item["expectation"] for item in report["expectations"] if not item["success"]]
    assert not report["success"] and words.split(":")[0] in failed
    assert "FAIL" in (tmp_path / "quality" / "report.html").read_text()


def test_every_failure_is_listed_at_once(tmp_path: Path) -> None:
    rows = good(4)
    _digest(rows)
    _no_title(rows)
    with pytest.raises(QualityError) as caught:
        run(tmp_path, rows)
    assert len(caught.value.offenders) == 3


def test_nothing_usable_fails_and_still_reports(tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="at least 5 documents"):
        run(tmp_path, [row("docs", "a.md", "", "empty")])
    assert (tmp_path / "quality" / "report.json").is_file()


def test_no_sources_at_all(tmp_path: Path) -> None:
    paths = SimpleNamespace(documents=tmp_path, out=tmp_path / "quality")
    with pytest.raises(InputError, match="no documents"):
        quality.run(paths, params())
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no")
    with pytest.raises(InputError, match="not a Parquet file"):
        quality.run(paths, params())


def test_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, good(6))
    seen = capfd.readouterr()
    assert seen.err == "" and seen.out.count("\n") == 1
