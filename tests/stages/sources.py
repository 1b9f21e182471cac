"""What the tests of the stage documents share: one source read into rows."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq

from contracts.params import Params, Source, load_params
from contracts.records import Document
from contracts.settings import ROOT
from stages import documents

Row = dict[str, Any]


def params_with(source: Source, **block: Any) -> Params:
    base = load_params(ROOT / "params.yaml")
    changed = base.documents.model_copy(update={"sources": {"s": source}, **block})
    return base.model_copy(update={"documents": changed})


def read(tmp_path: Path, uri: str, *, path: str = ".", block: Any = None, **source: Any) -> Rows:
    """The stage's rows of one source called "s", through its Parquet file."""
    out = tmp_path / "out" / "s.parquet"
    params = params_with(Source(uri=uri, path=path, **source), **(block or {}))
    metrics = documents.run(SimpleNamespace(key="s", out=out), params)
    rows = Rows((row["path"], row) for row in pq.read_table(out).to_pylist())
    assert metrics["documents"] == len(rows)  # so paths are unique
    assert metrics["unreadable"] == sum(row["problem"] is not None for row in rows.values())
    for row in rows.values():
        check(row)
    return rows


def check(row: Row) -> None:
    """What holds for every row."""
    record = Document.model_validate({key: row[key] for key in row if key != "problem"})
    assert record.doc_id == f"s:{record.path}" and record.title
    assert bool(record.text) == (row["problem"] is None)
    assert "\n" not in record.path + (row["problem"] or "")
    for heading in record.headings:
        line = record.text[heading.start :].split("\n", 1)[0]
        assert heading.title in line, (heading, line)


class Rows(dict[str, Row]):
    """Rows by path."""

    def text(self, path: str) -> str:
        assert self[path]["problem"] is None, self[path]["problem"]
        return str(self[path]["text"])

    def problems(self) -> dict[str, str]:
        return {path: row["problem"] for path, row in self.items() if row["problem"]}

    def headings(self, path: str) -> list[tuple[int, str]]:
        return [(item["level"], item["title"]) for item in self[path]["headings"]]


def zip_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def pdf_bytes(*pages: str, password: str | None = None, title: str | None = None) -> bytes:
    """A PDF with a page for each text; an empty text is an empty page."""
    from fpdf import FPDF

    pdf = FPDF()
    pdf.set_font("Helvetica")
    if title:
        pdf.set_title(title)
    if password:
        pdf.set_encryption(owner_password="owner", user_password=password)
    for text in pages:
        pdf.add_page()
        pdf.multi_cell(0, text=text)
    return bytes(pdf.output())


def docx_bytes() -> bytes:
    from docx import Document as Docx

    document = Docx()
    document.add_heading("The handbook", 0)
    document.add_heading("Rollback", 1)
    document.add_paragraph("A channel points at one release, and a rollback moves that pointer.")
    table = document.add_table(rows=2, cols=2)
    for number, cell in enumerate([*table.rows[0].cells, *table.rows[1].cells]):
        cell.text = f"cell {number}"
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()
