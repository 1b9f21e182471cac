"""reStructuredText, plain text and code are cut where a reader would cut them."""

from __future__ import annotations

import textwrap

import pytest

from contracts.records import Heading
from stages.splitting import Strategy, split
from tests.stages.split_checks import COUNTER, check


def heading(text: str, title: str, level: int) -> Heading:
    return Heading(level=level, title=title, start=text.index(f"{title}\n"))


RST = """\
=====
Guide
=====

Gates
=====

A gate judges.

Floors
------

Low.

Releases
========

A release is a file.
"""


def test_rst_sections_follow_the_documents_headings() -> None:
    found = [heading(RST, name, level) for name, level in [("Guide", 1), ("Gates", 2)]]
    found += [heading(RST, "Floors", 3), heading(RST, "Releases", 2)]
    spans = split(RST, 64, COUNTER, format="rst", headings=found)
    assert [span.heading for span in spans] == [
        "Guide > Gates",
        "Guide > Gates > Floors",
        "Guide > Releases",
    ]
    assert RST[spans[0].start : spans[0].end] == (
        "=====\nGuide\n=====\n\nGates\n=====\n\nA gate judges."
    )
    assert RST[spans[1].start : spans[1].end] == "Floors\n------\n\nLow."


def test_rst_code_and_literal_blocks_stay_whole() -> None:
    prose = "Some words that stand around it. " * 6
    code = "\n".join(f"   value_{n} = {n}" if n % 5 else "" for n in range(12)).strip("\n")
    blocks = [
        f".. code-block:: python\n   :linenos:\n\n{code}",
        f"Like this::\n\n{code}",
        ">>> first(1)\n2\n>>> second(2)\n3",
    ]
    for block in blocks:
        body = block.partition("::\n\n")[2] or block
        pieces = check(f"{prose}\n\n{block}\n\n{prose}", 96, format="rst")
        assert len(pieces) > 1
        assert any(body.strip() in piece for piece in pieces)


def test_a_simple_table_is_torn_between_rows() -> None:
    rows = [
        f"key{n:02}   The meaning of key {n}. It has two\n        sentences, on two lines."
        for n in range(30)
    ]
    text = "=====   =====\nName    Means\n=====   =====\n" + "\n".join(rows) + "\n=====   =====\n"
    pieces = check(text, 64, format="rst")
    assert len(pieces) > 5
    assert all(any(row in piece for piece in pieces) for row in rows)


def test_a_grid_table_is_torn_between_rows() -> None:
    rows = [f"| key {n:02} | It has two.  |\n|        | Sentences.   |\n" for n in range(20)]
    text = "+--------+--------------+\n" + "".join(
        row + "+--------+--------------+\n" for row in rows
    )
    pieces = check(text, 96, format="rst")
    assert len(pieces) > 3
    assert all(any(row.strip() in piece for piece in pieces) for row in rows)


@pytest.mark.parametrize("format", ["markdown", "text"])
def test_a_pipe_table_is_torn_between_rows(format: str) -> None:
    rows = [f"| key {n} | Means {n}. And more. It has three sentences. |" for n in range(40)]
    text = "| Name | Means |\n|---|---|\n" + "\n".join(rows)
    pieces = check(text, 64, format=format)
    assert len(pieces) > 5
    assert all(any(row in piece for piece in pieces) for row in rows)


def test_plain_text_is_cut_at_paragraphs() -> None:
    paragraphs = [f"Paragraph {n} says one thing. Then it says {n} more things." for n in range(40)]
    pieces = check("\n\n".join(paragraphs), 64, format="text")
    assert all(any(one in piece for piece in pieces) for one in paragraphs)
    assert len(pieces) < 20


def test_chinese_is_cut_at_sentences() -> None:
    sentences = [f"这是第{n}句话，它说明了缓存的大小。" for n in range(40)]
    pieces = check("".join(sentences), 64, format="text")
    assert all(piece.endswith("。") for piece in pieces)


FUNCTION = """\
# Why it is here.
@decorated(once=True)
def function_{n}(argument, other):
    \"\"\"Does {n} things.

    Then it ends.
    \"\"\"
    if argument:
        total = argument * {n}

    return other
"""


@pytest.mark.parametrize("strategy", ["structure", "code"])
def test_functions_stay_whole_with_decorators_and_comments(strategy: Strategy) -> None:
    functions = [FUNCTION.format(n=n) for n in range(12)]
    text = '"""A module."""\n\nimport os\nimport sys\n\n\n' + "\n\n".join(functions)
    for language in ("python", ""):
        pieces = check(text, 100, format="code", strategy=strategy, language=language)
        for one in functions:
            assert any(one.strip() in piece for piece in pieces)
        assert len(pieces) <= len(functions) + 1


def test_a_class_that_fits_is_whole_and_a_larger_one_is_cut_between_methods() -> None:
    methods = [
        f"    def method_{n}(self):\n        value = self.first({n})\n\n        return value\n"
        for n in range(12)
    ]
    small = "class Small:\n    limit = 3\n\n" + "\n".join(methods[:2])
    large = "class Large:\n    limit = 3\n\n" + "\n".join(methods)
    text = f"import os\n\n{small}\n\n{large}\n\nlast = 1\n"
    pieces = check(text, 64, format="code", language="python")
    assert any(small.strip() in piece for piece in pieces)
    assert all(any(one.strip() in piece for piece in pieces) for one in methods)
    spans = split(text, 24, COUNTER, format="code", language="python")
    named = {span.heading for span in spans}
    assert {"Small > method_1", "Large > method_11"} <= named
    assert spans[0].heading == ""


def test_a_function_over_the_limit_is_cut_between_statements() -> None:
    body = "".join(
        f"    value_{n} = compute(\n        first={n},\n        second={n},\n    )\n"
        for n in range(30)
    )
    pieces = check(f"def long():\n{body}", 64, format="code", language="python")
    assert len(pieces) > 5
    assert all(piece.startswith(("def", "value_")) for piece in pieces)


GO = """\
// Name{n} does it.
// It says more.
func Name{n}(a int) int {{
\tif a > {n} {{
\t\treturn a
\t}}

\treturn {n}
}}
"""
BROKEN = """\
# About {n}.
@decorator
def broken_{n}(a)
    if a:
        print "a", {n}

    return a
"""


@pytest.mark.parametrize(("unit", "language"), [(GO, "go"), (BROKEN, "python")])
def test_other_languages_are_cut_by_indentation(unit: str, language: str) -> None:
    units = [unit.format(n=n) for n in range(20)]
    text = "package main\n\n" + "\n".join(units)
    pieces = check(text, 90, format="code", language=language)
    assert len(pieces) > 5
    assert all(any(one.strip() in piece for piece in pieces) for one in units)


def test_a_first_method_that_fits_stays_whole_below_a_long_head() -> None:
    head = "class Large(\n" + "".join(f"    Base{n},\n" for n in range(10)) + "):\n"
    methods = [
        f"    def method_{n}(self):\n        one = {n}\n        two = {n}\n\n        return one\n"
        for n in range(3)
    ]
    pieces = check(head + "\n".join(methods), 48, format="code", language="python")
    assert all(any(one.strip() in piece for piece in pieces) for one in methods)


FORMATS = ["markdown", "rst", "text", "docstring"]


@pytest.mark.parametrize("format", FORMATS)
def test_sentences_go_before_wrapped_lines(format: str) -> None:
    """One short line, left by an edit, does not make a paragraph one of lines."""
    sentences = [
        f"Sentence number {n} says that it holds {n} of the cached vectors today."
        for n in range(30)
    ]
    rows = textwrap.wrap(" ".join(sentences), 100)
    words = rows[5].split()
    rows[5:6] = [" ".join(words[:6]), " ".join(words[6:])]
    pieces = check("\n".join(rows), 64, format=format)
    assert len(pieces) > 5
    assert all(piece.startswith("Sentence") and piece.endswith("today.") for piece in pieces)


@pytest.mark.parametrize("format", FORMATS)
def test_lines_that_are_not_wrapped_go_before_sentences(format: str) -> None:
    rows = [f"Speaker says {n}. And then he says {'more ' * (n % 4)}words" for n in range(40)]
    pieces = check("\n".join(rows), 48, format=format)
    assert len(pieces) > 5
    assert all(piece.startswith("Speaker") for piece in pieces)


def test_recursive_prefers_paragraphs_to_lines_to_sentences_to_words() -> None:
    paragraph = "First line of it. Still the first.\nSecond line of it. And still."
    pieces = check("\n\n".join([paragraph] * 30), 48, format="markdown", strategy="recursive")
    assert all(piece.startswith("First line") and piece.endswith("still.") for piece in pieces)
    lines = [f"Line {n} has words. It has {'more ' * (n % 4)}words" for n in range(40)]
    pieces = check("\n".join(lines), 48, format="markdown", strategy="recursive")
    assert all(piece.startswith("Line") for piece in pieces)
    sentences = [f"Sentence {n} has some words." for n in range(60)]
    pieces = check(" ".join(sentences), 48, format="markdown", strategy="recursive")
    assert all(piece.startswith("Sentence") for piece in pieces)
    assert len(check("word " * 500, 48, format="markdown", strategy="recursive")) == 11


def test_recursive_and_fixed_know_no_headings() -> None:
    text = "# One\n\nSome words.\n\n# Two\n\nMore words.\n"
    for strategy in ("recursive", "fixed"):
        spans = split(text, 64, COUNTER, format="markdown", strategy=strategy)  # type: ignore[arg-type]
        assert [(span.heading, text[span.start : span.end]) for span in spans] == [
            ("", text.strip())
        ]


def test_fixed_fills_every_chunk_but_the_last() -> None:
    spans = split("word " * 500, 64, COUNTER, format="text", strategy="fixed")
    assert [span.tokens for span in spans] == [64] * 7 + [52]
