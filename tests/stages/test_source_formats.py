"""Formats: what text, headings and language come out of each; no scan is slower than linear."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from pathlib import Path

import pytest

from contracts.settings import ROOT
from stages.docstrings import docstrings
from stages.markdown import blocks
from stages.sources.formats import kind_of, text_kind
from stages.sources.headings import Heading, headings, markdown
from stages.sources.language import languages
from tests.stages.sources import Rows, docx_bytes, pdf_bytes, read

PAGE = b"""<!doctype html><html><head><title>Gates &amp; more</title><style>p {}</style></head>
<body><nav><a href="/">Home of everything</a></nav><main><h1>The gate</h1><script>alert(1)</script>
<p>It judges a <b>candidate</b> against the stable release, question by question.</p>
<h2>Floors</h2><ul><li>one_two</li></ul><pre># not a heading
x = 1</pre><table><tr><th>a</th></tr><tr><td>1</td></tr></table></main></body></html>"""

RST = """=====
Guide
=====

Install
-------
Text of this section.

Not a title because it
is a paragraph
--------------

From source
~~~~~~~~~~~
* item

Use
---
"""

CODE = '''"""Module."""
class Thing:
    """It does."""

    def go(self):
        if True:
            def inner(): ...

async def later(): ...
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def read_files(folder: Path, tmp_path: Path, **files: bytes) -> Rows:
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    rows = read(tmp_path, "in")
    for name, data in files.items():
        assert rows[name.replace("__", ".")]["md5"] == hashlib.md5(data).hexdigest()
    return rows


def test_text_formats_keep_their_bytes(folder: Path, tmp_path: Path) -> None:
    files = {
        "a__md": "\ufeff# Größe\r\n\r\n```\n# code\n```\n## Zwei ##\n".encode(),
        "b__rst": RST.encode(),
        "c__txt": b"# no Markdown here\n",
        "d__py": CODE.encode(),
        "e__rs": b"fn main() {}\r\n",
        "f__csv": b"a,b\n1,2\n",
        "README": b"Words in a file without a suffix.\n",
        "run": b"#!/usr/bin/env python3\nprint(1)\n",
    }
    rows = read_files(folder, tmp_path, **files)
    for name, data in files.items():
        row = rows[name.replace("__", ".")]
        assert row["text"].encode() == data and row["git_path"] == f"in/{row['path']}"
    found = {path: (row["format"], row["language"], row["title"]) for path, row in rows.items()}
    assert found == {
        "a.md": ("markdown", "", "Größe"),
        "b.rst": ("rst", "en", "Guide"),
        "c.txt": ("text", "", "c"),
        "d.py": ("code", "python", "d.py"),
        "e.rs": ("code", "rust", "e.rs"),
        "f.csv": ("text", "", "f"),
        "README": ("text", "", "README"),
        "run": ("code", "python", "run"),
    }
    assert rows.headings("a.md") == [(1, "Größe"), (2, "Zwei")]
    assert rows.headings("b.rst") == [(1, "Guide"), (2, "Install"), (3, "From source"), (2, "Use")]
    assert rows.headings("d.py") == [(1, "Thing"), (2, "go"), (3, "inner"), (1, "later")]
    assert rows.headings("run") == rows.headings("c.txt") == []


def test_html_docx_and_pdf_become_text(folder: Path, tmp_path: Path) -> None:
    pages = ("The first page says that a release names every input by its digest.", "Second page.")
    rows = read_files(
        folder,
        tmp_path,
        page__html=PAGE,
        latin__htm='<meta charset="iso-8859-1"><p>Größe</p>'.encode("latin-1"),
        hand__docx=docx_bytes(),
        paper__pdf=pdf_bytes(*pages, title="On releases"),
        paper=pdf_bytes(*pages),  # by its first bytes
    )
    text = rows.text("page.html")
    assert "Home of everything" not in text and "alert" not in text and "{}" not in text
    assert "It judges a **candidate** against" in text and "- one_two" in text
    assert "```\n# not a heading\nx = 1\n```" in text and "| a |\n| --- |\n| 1 |" in text
    assert rows.headings("page.html") == [(1, "The gate"), (2, "Floors")]
    assert rows["page.html"]["title"] == "The gate" and rows["page.html"]["language"] == "en"
    assert rows.text("latin.htm") == "Größe\n"
    assert rows.headings("hand.docx") == [(1, "The handbook"), (1, "Rollback")]
    assert "| cell 0 | cell 1 |" in rows.text("hand.docx")
    assert rows["hand.docx"]["format"] == "markdown"
    paper = rows["paper.pdf"]
    assert paper["text"] == "\n\n".join(pages) + "\n" == rows.text("paper")
    assert (paper["format"], paper["title"], paper["language"]) == ("text", "On releases", "en")


def package_texts(name: str, pattern: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return [file.read_text() for file in sorted(folder.rglob(pattern))]


@pytest.mark.slow
def test_markdown_headings_are_those_that_chunks_see() -> None:
    """Documents and chunks scan for themselves: a heading of one must be one of the other."""
    texts = [file.read_text() for file in sorted((ROOT / "docs").rglob("*.md"))]
    texts += [text for _, text in docstrings("dagster_dvc", ROOT / "dagster_dvc")]
    texts += package_texts("dagster", "*.md") + package_texts("mlflow", "*.md")
    assert sum("```" in text for text in texts) >= 10
    for text in texts:
        seen = [(b.level, b.name, b.start) for b in blocks(text) if b.kind == "heading"]
        assert [(h["level"], h["title"], h["start"]) for h in markdown(text)] == seen


def test_a_docstring_has_labels_and_underlined_titles() -> None:
    text = "Reads.\n\nArgs:\n    path: where.\n\nNotes\n-----\nMore.\n"
    assert headings("docstring", text) == [
        heading(1, "Args", 8),
        heading(1, "Notes", text.index("Notes")),
    ]


def heading(level: int, title: str, start: int) -> Heading:
    return {"level": level, "title": title, "start": start}


def test_kinds_by_name_and_content() -> None:
    assert kind_of("A.MD", b"") == "markdown" and kind_of("Makefile", b"") == "code:make"
    assert kind_of("x", b"\xef\xbb\xbf <!DOCTYPE html>") == "html"
    assert kind_of("x", docx_bytes()) == "docx" and kind_of("x", b"PK\x03\x04\0") == "text"
    assert kind_of("x.unknown", b"#!/bin/bash\n") == "code:bash"
    assert kind_of("x", b"#!nothing known\n") == "text" == kind_of("x", b"#!")
    assert text_kind("a.pdf") == text_kind("") == "text" and text_kind("a.rst") == "rst"


def test_languages_of_prose_and_none_where_it_is_unsure() -> None:
    said = {
        "de": "Die Pipeline liest jede Nacht alle Dokumente, damit am Morgen nichts verloren ist.",
        "fr": "Les documents sont lus chaque nuit et écrits dans une table, sans rien perdre.",
        "en": "Documents are read every night and written into one table, and nothing is lost.",
        "ru": "Документы читаются каждую ночь и записываются в таблицу, чтобы всё сохранилось.",
    }
    assert languages(list(said.values())) == list(said)
    fenced = "```\nfor each of the words in the list that is here\n```\n"
    assert languages(["", "Too short.", fenced * 9]) == ["", "", ""]
    assert languages([fenced * 9 + said["de"]]) == ["de"]  # the prose decides, not the code


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("markdown", "# " + " " * 200_000 + "x"),
        ("markdown", "#" * 200_000),
        ("markdown", "# a" + " #" * 100_000),
        ("markdown", "`" * 200_000),
        ("markdown", "```\n" * 50_001),
        ("markdown", "# a\n" * 50_000),
        ("rst", "=" * 200_000),
        ("rst", "a\n=\n" * 50_000),
        ("rst", " " * 200_000 + "\n===="),
        ("code:python", "-" * 200_000 + "1"),
        ("code:python", "(" * 200_000),
        ("code:python", "a" + ".a" * 100_000),
    ],
)
def test_no_text_is_slow_to_scan(kind: str, text: str) -> None:
    started = time.process_time()
    headings(kind, text)
    languages([text])
    assert time.process_time() - started < 2  # measured: at most 0.2 s, first loading of lingua 0.2
