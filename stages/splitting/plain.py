"""The structure of reStructuredText and of plain text, as blocks and sections.

In: a text and its headings (found by whoever read the document). Out: sections of blocks as
``stages.markdown`` has them. Nothing is rendered: directives of code, literal blocks, doctests and
tables are kept together, the rest is paragraphs and items.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.markdown import Block, Section, group, lines

if TYPE_CHECKING:
    from stages.splitting.parts import Heading

ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1+[ \t\r\n]*$")
SIMPLE = re.compile(r"[ \t]*=+(?:[ \t]+=+)+[ \t\r\n]*$")  # a border of a simple table
GRID = re.compile(r"[ \t]*\+[-=+]+\+[ \t\r\n]*$")  # a border of a grid table
ITEM = re.compile(r"[ \t]*(?:[-*+•]|#\.|\(?(?:\d{1,3}|[A-Za-z])[.)]|:[^:\n]{1,60}:)[ \t]+\S")
#: Directives whose content is code or a table, to be kept whole.
WHOLE = re.compile(
    r"[ \t]*\.\.[ \t]+(?:code-block|code|sourcecode|literalinclude|parsed-literal|highlight|math|"
    r"ipython|jupyter-execute|testcode|doctest|productionlist|graphviz|csv-table|list-table|table|"
    r"raw|toctree)::"
)
DIRECTIVE = re.compile(r"[ \t]*\.\.[ \t]+[\w:.-]{1,60}::")


def plain_sections(text: str, headings: Sequence[Heading]) -> list[Section]:
    """Sections by ``headings``; a text without any is one."""
    levels = {heading.start: (heading.level, heading.title) for heading in headings}
    return group(plain_blocks(text, levels))


def plain_blocks(text: str, headings: dict[int, tuple[int, str]]) -> list[Block]:
    """The blocks of a text, in order.

    Args:
        headings: offset of a heading's line -> its level and title.
    """
    every = list(lines(text))
    found: list[Block] = []
    number, joins, literal = 0, False, False  # literal: an indented block that follows is code
    while number < len(every):
        _, line = every[number]
        if not line.strip():
            number, joins = number + 1, False
            continue
        last, block = _block(every, number, headings, literal and not joins)
        previous = found[-1] if found else None
        if joins and previous is not None and block.kind == "paragraph":
            block = Block(previous.kind, previous.start, block.end)
            found.pop()
        elif block.kind == "heading" and joins and previous is not None and _adorns(text, previous):
            block = Block("heading", previous.start, block.end, block.level, block.name)
            found.pop()
        found.append(block)
        literal = every[last][1].rstrip().endswith("::")
        number, joins = last + 1, block.kind in ("paragraph", "item")
    return found


def _adorns(text: str, block: Block) -> bool:
    """Whether the block is the line above a heading's title."""
    return bool(ADORNMENT.match(text[block.start : block.end]))


def _block(
    every: list[tuple[int, str]],
    number: int,
    headings: dict[int, tuple[int, str]],
    literal: bool,
) -> tuple[int, Block]:
    """(number of its last line, the block that line ``number`` begins or continues)."""
    start, line = every[number]
    if start in headings:
        level, name = headings[start]
        last = number
        while last + 1 < len(every) and ADORNMENT.match(every[last + 1][1]):
            last += 1
        if ADORNMENT.match(line) and last == number:  # the offset of the line above the title
            last = min(number + 2, len(every) - 1)
        return last, Block("heading", start, _end(every, last), level, name)
    whole = WHOLE.match(line)
    if whole or (literal and line[0] in " \t"):
        last = _indented(every, number, _indent(line) - (0 if whole else 1))
        return last, Block("fence", start, _end(every, last))
    if line.lstrip().startswith((">>>", "In [")):
        last = _until_blank(every, number)
        return last, Block("fence", start, _end(every, last))
    if GRID.match(line):
        last = _until_blank(every, number)
        rows = tuple(at for at, row in every[number + 1 : last] if GRID.match(row))
        return last, Block("table", start, _end(every, last), rows=rows)
    if SIMPLE.match(line):
        last = _simple_table(every, number)
        if last > number:
            edge = _indent(line)
            rows = tuple(
                at
                for at, row in every[number + 1 : last]
                if row.strip() and _indent(row) <= edge and not SIMPLE.match(row)
            )
            return last, Block("table", start, _end(every, last), rows=rows)
    if line.lstrip().startswith("|"):
        last = number
        while last + 1 < len(every) and every[last + 1][1].lstrip().startswith("|"):
            last += 1
        return last, Block("table", start, _end(every, last))
    item = ITEM.match(line) or DIRECTIVE.match(line)
    return number, Block("item" if item else "paragraph", start, _end(every, number))


def _end(every: list[tuple[int, str]], number: int) -> int:
    return every[number][0] + len(every[number][1])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _indented(every: list[tuple[int, str]], number: int, edge: int) -> int:
    """The last of the lines after ``number`` that are indented by more than ``edge``."""
    last = number
    for following in range(number + 1, len(every)):
        line = every[following][1]
        if line.strip():
            if _indent(line) <= edge:
                break
            last = following
    return last


def _until_blank(every: list[tuple[int, str]], number: int) -> int:
    while number + 1 < len(every) and every[number + 1][1].strip():
        number += 1
    return number


def _simple_table(every: list[tuple[int, str]], number: int) -> int:
    """The line of a simple table's last border: the one that an empty line follows."""
    for following in range(number + 1, min(len(every), number + 2000)):
        if SIMPLE.match(every[following][1]) and (
            following + 1 == len(every) or not every[following + 1][1].strip()
        ):
            return following
    return number
