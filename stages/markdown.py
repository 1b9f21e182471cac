"""The structure of a document's text, as character offsets; the text itself is never changed.

In: Markdown, or a docstring. Out: blocks (heading, fence, table, paragraph, list item) and sections
(what stands below one heading, with the heading path).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
#: A longer line is no heading; and HEADING takes quadratic time on a line of spaces.
LONGEST_HEADING = 1000
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,3}[.)])[ \t]+\S")
#: Sections of a Google-style docstring.
LABEL = re.compile(
    r"(Args|Arguments|Attributes|Examples?|Keyword Args|Notes?|Parameters|Raises|Returns|See Also|"
    r"Warnings?|Yields):[ \t]*$"
)

#: An entry of such a section: "    path (Path): where it goes", "    path: where it goes".
ENTRY = re.compile(r"[ \t]+\*{0,2}\w+[ \t]*(?:\(.*\))?:(?:[ \t]|$)")

Kind = Literal["heading", "label", "fence", "table", "paragraph", "item"]


@dataclass(frozen=True)
class Block:
    """Lines that belong together: ``text[start:end]``, line ends included."""

    kind: Kind
    start: int
    end: int
    level: int = 0  # of a heading
    name: str = ""  # of a heading or label
    rows: tuple[int, ...] = ()  # of a table: where its rows begin, if not at every line


@dataclass(frozen=True)
class Section:
    """What stands below one heading, the heading included."""

    heading: str  # path, " > "-joined
    start: int
    end: int
    blocks: tuple[Block, ...]


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(offset, line with its end) over ``text``; only \\n ends a line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield start, text[start:end]
        start = end


def blocks(text: str, markdown: bool = True) -> list[Block]:
    """The blocks of a text, in order. Blank lines belong to none.

    Args:
        markdown: headings are ``#`` lines; otherwise the text is a docstring, and its sections
            begin at ``Args:`` and the like.
    """
    found: list[Block] = []
    fence = ""  # the marker that closes the open fence
    kind: Kind | None = None  # of the block that the next line may continue
    for start, line in lines(text):
        end, bare = start + len(line), line.strip()
        if fence:
            found[-1] = Block("fence", found[-1].start, end)
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence, kind = "", None
            continue
        if not bare:
            kind = None
            continue
        new = _block(line, start, end, markdown)
        if new.kind == "fence":
            fence = FENCE.match(line)[1]  # type: ignore[index]  # matched in _block
        joins = new.kind == kind or (kind == "item" and new.kind == "paragraph")
        if joins and new.kind in ("paragraph", "table"):
            found[-1] = Block(kind or new.kind, found[-1].start, end)
        else:
            found.append(new)
            kind = None if new.kind in ("heading", "label") else new.kind
    return found


def paragraphs(text: str) -> Iterator[Block]:
    """What stands between empty lines, whatever it is."""
    start, end = 0, -1  # end: -1 outside of a paragraph
    for offset, line in lines(text):
        if line.strip():
            start, end = (offset if end < 0 else start), offset + len(line)
        elif end >= 0:
            yield Block("paragraph", start, end)
            end = -1
    if end >= 0:
        yield Block("paragraph", start, end)


def _block(line: str, start: int, end: int, markdown: bool) -> Block:
    """The block that this line begins, or that it continues."""
    bare = line.rstrip("\r\n").lstrip("\ufeff")
    if markdown and len(bare) <= LONGEST_HEADING and (match := HEADING.match(bare)):
        return Block("heading", start, end, len(match[1]), match[2])
    if not markdown and (match := LABEL.match(bare)):
        return Block("label", start, end, 0, match[1])
    if FENCE.match(line):
        return Block("fence", start, end)
    if bare.lstrip().startswith("|"):
        return Block("table", start, end)
    entry = ITEM.match(line) or (not markdown and ENTRY.match(bare))
    return Block("item" if entry else "paragraph", start, end)


def sections(text: str) -> list[Section]:
    """Sections of a Markdown text; together they cover every block."""
    return group(blocks(text))


def group(parts: Iterable[Block]) -> list[Section]:
    """Blocks as sections, one a heading.

    A heading with nothing below it but a deeper heading opens the section that follows: a chunk of
    a bare heading answers nothing.
    """
    found: list[Section] = []
    path: list[tuple[int, str]] = []
    held: list[Block] = []
    heading = ""
    for block in parts:
        if block.kind == "heading":
            if any(item.kind != "heading" for item in held):
                found.append(_section(heading, held))
                held = []
            path = [item for item in path if item[0] < block.level]
            path.append((block.level, block.name))
            heading = " > ".join(name for _, name in path)
        held.append(block)
    if held:
        found.append(_section(heading, held))
    return found


def _section(heading: str, held: list[Block]) -> Section:
    return Section(heading, held[0].start, held[-1].end, tuple(held))


def first_heading(text: str) -> str | None:
    """The text of the first heading of a Markdown text."""
    return next((block.name for block in blocks(text) if block.kind == "heading"), None)
