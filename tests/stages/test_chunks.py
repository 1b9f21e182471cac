"""Chunks are faithful to the text, exact in tokens and cut where a reader would cut."""

from __future__ import annotations

import pytest

from contracts.records import Chunk, Document
from stages.chunks import chunk_rows
from stages.markdown import blocks, first_heading, sections
from stages.splitting import split
from tests.stages.split_checks import COUNTER, check


def test_headings_are_hard_borders_and_name_the_path() -> None:
    text = "# Guide\n\nHi.\n\n## Gates\n\nA gate judges.\n\n### Floors\n\nLow.\n\n## Releases\n\nA."
    found = split(text, 128, COUNTER, format="markdown")
    assert [span.heading for span in found] == [
        "Guide",
        "Guide > Gates",
        "Guide > Gates > Floors",
        "Guide > Releases",
    ]
    assert text[found[1].start : found[1].end] == "## Gates\n\nA gate judges."


def test_a_bare_heading_joins_what_follows() -> None:
    text = "# Guide\n\n## Gates\n\nA gate judges.\n\n## Empty\n"
    found = split(text, 128, COUNTER, format="markdown")
    assert [(span.heading, text[span.start : span.end]) for span in found] == [
        ("Guide > Gates", "# Guide\n\n## Gates\n\nA gate judges."),
        ("Guide > Empty", "## Empty"),
    ]


@pytest.mark.parametrize("marker", ["```", "~~~~"])
def test_a_fence_that_fits_is_not_torn_and_hides_its_comments(marker: str) -> None:
    code = "\n".join(f"value_{i} = {i}  # not a heading" for i in range(10))
    fence = f"{marker}python\n# comment, not a heading\n\n{code}\n{marker}"
    text = (
        "# T\n\n" + "Some words before it. " * 12 + f"\n\n{fence}\n\n" + "Some words after. " * 20
    )
    pieces = check(text, 128, format="markdown")
    assert len(pieces) > 2
    assert any(fence in piece for piece in pieces)
    assert len(sections(text)) == 1


@pytest.mark.parametrize("lines", [14, 30])
def test_a_heading_leaves_a_fence_only_to_keep_it_whole(lines: int) -> None:
    heading = "## A heading of so many words that nothing else would fit beside it any more"
    fence = "```\n" + "\n".join(f"call({i}, {i})" for i in range(lines)) + "\n```"
    pieces = check(f"{heading}\n\n{fence}\n", 96, format="markdown")
    if lines == 14:
        assert pieces == [heading, fence]
    else:
        assert len(pieces) > 2
        assert pieces[0].startswith(f"{heading}\n\n```\ncall(0, 0)")


def test_a_fence_over_the_limit_is_torn_at_lines() -> None:
    lines = [f"call_number_{i}(argument={i})" for i in range(80)]
    text = "```\n" + "\n".join(lines) + "\n```\n"
    pieces = check(text, 64, format="markdown")
    whole = {line for piece in pieces for line in piece.splitlines()}
    assert set(lines) <= whole


def test_sentences_stay_whole_where_they_fit() -> None:
    sentences = [
        f"Sentence number {i} says that the cache holds {i} vectors today." for i in range(40)
    ]
    pieces = check(" ".join(sentences), 64, format="markdown")
    assert all(piece.endswith("today.") and piece.startswith("Sentence") for piece in pieces)
    assert min(len(piece) for piece in pieces[:-1]) > 100


def test_docstring_sections_are_preferred_cuts() -> None:
    text = (
        "Does a thing.\n\n"
        + "It explains the thing. " * 14
        + "\n\nArgs:\n    path: where. "
        + ("More about it. " * 12)
        + "\n\nReturns:\n    "
        + "The thing itself. " * 18
    )
    found = split(text, 96, COUNTER, format="docstring")
    assert [span.heading for span in found] == ["", "Args", "Returns"]
    assert text[found[1].start :].startswith("Args:")


def test_entries_of_a_docstring_section_stay_whole() -> None:
    entries = [
        f"    option_{n} (Optional[Mapping[str, int]]): What option {n} means:\n"
        f"        Its values are: one, two. And three."
        for n in range(12)
    ]
    pieces = check("Does it.\n\nArgs:\n" + "\n".join(entries), 80, format="docstring")
    assert len(pieces) > 3
    for entry in entries:
        assert any(entry.strip() in piece for piece in pieces)


def test_rows_are_chunk_records() -> None:
    document = Document(
        doc_id="docs:a.md",
        source="docs",
        path="a.md",
        title="A",
        md5="0" * 32,
        text="# A\n\n  Two  spaces stay.\n\nfoo_bar() stays too.\n",
        git_path="docs/a.md",
        format="markdown",
        language="en",
        licence="MIT",
    )
    rows = list(chunk_rows(document, 128, COUNTER))
    chunk = Chunk.model_validate(rows[0])
    assert len(rows) == 1
    assert (chunk.format, chunk.language, chunk.licence) == ("markdown", "en", "MIT")
    assert chunk.text == document.text[chunk.start : chunk.end] == document.text.strip()
    assert chunk.chunk_id == f"docs:a.md#{chunk.start}-{chunk.end}"


def test_first_heading_and_blocks() -> None:
    text = "\ufefffirst\n\n```\n# no\n```\n\n##  The *title* ##\r\n\n| a |\n|---|\n- x\n  more\n- y"
    assert first_heading(text) == "The *title*"
    kinds = [block.kind for block in blocks(text)]
    assert kinds == ["paragraph", "fence", "heading", "table", "item", "item"]
