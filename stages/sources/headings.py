"""The headings of a text, in order: level, title, and where the heading's line begins.

Every scan is linear in the text, whatever is in it: texts come from strangers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from stages.markdown import LONGEST_HEADING, blocks

Heading = dict[str, Any]  # as contracts.records.Heading

#: Characters of Python that are parsed: 3 s and 0.4 GB. What is larger was written by a machine.
LARGEST = 4 << 20

MARK = re.compile(r"^\ufeff? {0,3}(?:(#{1,6})[ \t]{1,100}(?=[^\s])|(`{3,1000}|~{3,1000}))", re.M)
CLOSING = re.compile(r"(?:^|[ \t]+)#+$")
ADORNMENT = re.compile(r"^([!-/:-@\[-`{-~])\1*[ \t]*\r?$", re.MULTILINE)
LINE_END = re.compile(r"\r\n|\r|\n")
#: Adornments shorter than their title are tolerated from this length on, as docutils does.
ENOUGH = 4


def headings(kind: str, text: str) -> list[Heading]:
    """Headings of a text of that kind; [] for kinds that have none."""
    if kind in ("markdown", "html", "docx"):
        return list(markdown(text))
    if kind == "rst":
        return list(rst(text))
    if kind == "docstring":
        found = [*rst(text), *labels(text)]
        return sorted(found, key=lambda item: item["start"])
    return list(python(text)) if kind == "code:python" else []


def markdown(text: str) -> Iterator[Heading]:
    """``#`` headings outside of fences, as ``stages.markdown`` sees them."""
    position = 0
    while match := MARK.search(text, position):
        end = _line_end(text, match.end())
        position = end
        if match[2]:
            fence = match[2]
            closing = re.compile(rf"^[ \t]*{fence[0]}{{{len(fence)},}}[ \t\r]*$", re.MULTILINE)
            found = closing.search(text, end)
            if found is None:
                return
            position = found.end()
        elif end - match.start() <= LONGEST_HEADING:
            title = CLOSING.sub("", text[match.end() : end].rstrip()).rstrip()
            if title:
                yield {"level": len(match[1]), "title": title, "start": match.start()}


def rst(text: str) -> Iterator[Heading]:
    """Titles by their adornment lines; a style's level is the order of its first use."""
    styles: list[tuple[str, bool]] = []
    used = -1  # end of the last title's adornment: it cannot be the next one's overline
    for match in ADORNMENT.finditer(text):
        sign, length = match[1], len(match[0].rstrip())
        start = _line_start(text, match.start() - 1)
        title = text[start : max(match.start() - 1, start)].rstrip()
        if start <= used or not title or len(title) > LONGEST_HEADING or ADORNMENT.match(title):
            continue
        if length < len(title.strip()) and length < ENOUGH:
            continue
        above_start = _line_start(text, start - 1)
        above = text[above_start : max(start - 1, above_start)].rstrip() if start else ""
        over = above_start > used and above == sign * length
        if not over and (above or title[0].isspace()):
            continue
        style = (sign, over)
        if style not in styles:
            styles.append(style)
        used = match.start()
        yield {"level": styles.index(style) + 1, "title": title.strip(), "start": start}


def labels(text: str) -> Iterator[Heading]:
    """``Args:`` and the like, in a docstring."""
    for block in blocks(text, markdown=False):
        if block.kind == "label":
            yield {"level": 1, "title": block.name, "start": block.start}


def python(text: str) -> Iterator[Heading]:
    """Classes and functions, nested as they are; nothing where the text is not Python 3."""
    if len(text) > LARGEST:
        return
    try:
        tree = ast.parse(text.removeprefix("\ufeff"))
        starts = [0, *(match.end() for match in LINE_END.finditer(text))]
        yield from _definitions(tree, starts, 1)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _definitions(node: ast.AST, starts: list[int], level: int) -> Iterator[Heading]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            start = starts[min(child.lineno, len(starts)) - 1]
            yield {"level": level, "title": child.name, "start": start}
            yield from _definitions(child, starts, level + 1)
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child, starts, level)


def _line_end(text: str, position: int) -> int:
    """Where the line that holds ``position`` ends, its line end excluded."""
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _line_start(text: str, position: int) -> int:
    """Where the line begins whose line end stands at ``position``."""
    return text.rfind("\n", 0, max(position, 0)) + 1
