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
from contracts.params import Params, Pii, load_params
from contracts.records import Document
from stages import quality
from stages.document_table import document_row, schema
from stages.tables import write_rows

ROOT = Path(__file__).parents[2]
POLICY = {"min_documents": 5, "min_characters": 20, "max_characters": 500, "max_quarantined": 0.3}
CARD = "4556 7375 8689 9855"  # passes Luhn
PROSE = (
    "The gate compares both score files question by question and writes down what it found. "
    "A candidate that loses on any floor is refused, and the reason names the metric, the bound "
    "and the value that was seen. Nothing is promoted while a score is missing, because a missing "
    "score says nothing about the answer that should have been there in its place."
)


def params(**policy: Any) -> Params:
    base = load_params(ROOT / "params.yaml")
    changed = base.quality.model_copy(update={**POLICY, "min_unique_text": 0.5, **policy})
    return base.model_copy(update={"quality": changed})


def row(source: str, path: str, text: str, problem: str | None = None, **rest: Any) -> Any:
    return document_row(source, path, text=text, problem=problem, **rest)


def good(count: int) -> list[dict[str, Any]]:
    texts = [f"Document number {n} has text of its own." for n in range(count)]
    return [row("docs", f"{n}.md", text) for n, text in enumerate(texts)]


def run(tmp_path: Path, rows: list[dict[str, Any]], **policy: Any) -> dict[str, float]:
    for source in {item["source"] for item in rows}:
        part = [item for item in rows if item["source"] == source]
        write_rows(tmp_path / "documents" / f"{source}.parquet", part, schema())
    golden = tmp_path / "questions.yaml"
    if not golden.exists():
        golden.write_text(
            "- {id: q-1, question: Which of the two scorecards is read first of all?}"
        )
    paths = SimpleNamespace(
        documents=tmp_path / "documents", golden=golden, out=tmp_path / "quality"
    )
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
        "near_copies": 0,
        "personal_data": 0,
        "redacted": 0,
        "expectations": 20,
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
    paths = SimpleNamespace(documents=tmp_path, golden=tmp_path / "q", out=tmp_path / "quality")
    with pytest.raises(InputError, match="no documents"):
        quality.run(paths, params())
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no")
    with pytest.raises(InputError, match="not a Parquet file"):
        quality.run(paths, params())


def test_each_class_of_defect_goes_to_quarantine_with_its_reason(tmp_path: Path) -> None:
    bad = [
        row("docs", "wrong.md", "It\u00e2\u20ac\u2122s \u00c3\u00bcber " * 9),
        row("docs", "bell.md", "A text with bells. \x07\x07\x07 It cannot be typed."),
        row("docs", "de.md", "Dieser Satz ist nicht englisch.", language="de"),
        row("docs", "de.py", "Dieser Satz ist Code, also egal.", language="de", format="code"),
        row("docs", "key.md", "The key AKIA" + "Q3EGVNYD4JXWTP2M" + " is in the text."),
        row("docs", "prose.md", PROSE),
        row("docs", "prose2.md", PROSE.replace("missing,", "absent,") + " Thus it stays."),
    ]
    metrics = run(tmp_path, [*good(15), *bad], near_duplicate=0.7)
    assert (metrics["defects"], metrics["near_copies"], metrics["accepted"]) == (4, 1, 17)
    reasons = {item["path"]: item["problem"] for item in read(tmp_path, "quarantine")}
    assert reasons["wrong.md"].startswith("mojibake: 1")
    assert reasons["bell.md"] == "control characters: 3 of 42"
    assert reasons["de.md"] == "language: de, not one of en"
    assert reasons["key.md"] == "api_key: in line 1"
    assert reasons["prose2.md"].startswith("near copy of docs:prose.md (similarity 0.")
    report = json.loads((tmp_path / "quality" / "report.json").read_text())
    assert report["quarantined_by_source"] == {"docs": report["quarantined"]}
    (family,) = report["near_copies"]
    assert family["kept"] == "docs:prose.md" and family["copies"][0]["doc_id"] == "docs:prose2.md"


def test_boilerplate_is_reported_and_a_page_of_nothing_else_is_set_aside(tmp_path: Path) -> None:
    notice = "This notice stands at the head of every page of the handbook.\n"
    rows = [row("docs", f"{n}.md", f"{notice}{text['text']} {n}") for n, text in enumerate(good(9))]
    rows.append(row("docs", "only.md", notice * 3 + "by: us"))
    run(tmp_path, rows, boilerplate_documents=5)
    (set_aside,) = read(tmp_path, "quarantine")
    assert set_aside["path"] == "only.md"
    assert set_aside["problem"] == "boilerplate: 97% of it stands in many other documents"
    report = json.loads((tmp_path / "quality" / "report.json").read_text())
    assert report["boilerplate"] == [{"line": notice.strip(), "documents": 10}]


def test_policy_decides_over_personal_data(tmp_path: Path) -> None:
    text = f"# Pay {CARD}\n\nWrite to anna@posteo.de or pay with {CARD} at once."
    heading = {"level": 1, "title": f"Pay {CARD}", "start": 0}
    page = row("docs", "pay.md", text, title=f"Pay {CARD}", headings=[heading])
    metrics = run(tmp_path, [*good(8), page])
    assert (metrics["personal_data"], metrics["redacted"]) == (3, 1)
    accepted = {item["path"]: item for item in read(tmp_path, "documents")}["pay.md"]
    masked = "XXXX XXXX XXXX XXXX"
    assert accepted["text"] == text.replace(CARD, masked)  # the e-mail address is only reported
    assert accepted["title"] == f"Pay {masked}"
    assert accepted["headings"] == [{**heading, "title": f"Pay {masked}"}]
    assert accepted["md5"] == page["md5"]

    run(tmp_path, [*good(8), page], pii=Pii(email="block"))
    (blocked,) = read(tmp_path, "quarantine")
    assert blocked["problem"] == "email: in line 3"
    assert CARD not in blocked["text"] and "anna@" not in blocked["text"]
    for name in ("report.html", "report.json"):
        shown = (tmp_path / "quality" / name).read_text()
        assert CARD not in shown and "anna@" not in shown and "XXXX@XXXXXX.XX" in shown


def test_texts_that_differ_in_masked_data_alone_are_copies(tmp_path: Path) -> None:
    rows = [
        row("docs", "a.md", f"Please pay with the card {CARD} today."),
        row("docs", "b.md", "Please pay with the card 5425 2334 3010 9903 today."),
    ]
    metrics = run(tmp_path, [*good(8), *rows])
    assert (metrics["copies"], metrics["redacted"]) == (1, 1)


def test_a_golden_question_in_a_document_blocks(tmp_path: Path) -> None:
    rows = good(8)
    rows[2]["text"] = (
        "Someone asked: which of the two scorecards is read FIRST of all? Nobody knew."
    )
    with pytest.raises(QualityError) as caught:
        run(tmp_path, rows)
    assert caught.value.offenders == [
        "no golden question stands in a document: 1 of 1 rows do not, e.g. 'q-1 in docs:2.md'"
    ]


def test_golden_questions_that_cannot_be_read(tmp_path: Path) -> None:
    for content in ("- {id: a}", "- word", "a: [", "7"):
        (tmp_path / "questions.yaml").write_text(content)
        with pytest.raises(InputError, match="golden questions cannot be read"):
            run(tmp_path, good(6))


def test_an_edit_scans_one_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("docs", f"{n}.md", f"{PROSE[n:]} Page {n} of the cached ones.") for n in range(9)]
    run(tmp_path, rows)
    rows[4]["text"] += " One sentence more."
    run(tmp_path, rows)
    seen = capsys.readouterr().out.splitlines()
    assert "(9 new texts scanned)" in seen[0] and "(1 new texts scanned)" in seen[1]


def test_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, good(6))
    seen = capfd.readouterr()
    assert seen.err == "" and seen.out.count("\n") == 1
