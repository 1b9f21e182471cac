"""The outline of source code: where a reader would cut it, and what should stay whole.

Python is read by its own parser; other languages, and Python that does not parse, by indentation
and empty lines. Decorators and the comment lines right above belong to what they stand before.
"""

from __future__ import annotations

import ast
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from stages.markdown import lines
from stages.splitting.cuts import TORN, Place

#: Larger files are read by indentation: a syntax tree takes some 100 times the memory of its text.
LARGEST_TREE = 2_000_000

#: Costs of a cut before a line (compare ``cuts.COST``): inside a statement, after an empty line
#: inside one, and before the first statement of a body, which stays with its head.
INSIDE, AFTER_BLANK, FIRST = 50.0, 40.0, 60.0

LINE_END = re.compile(r"\r\n|\r|\n")  # what the parser counts as lines
#: Lines without indentation that go on with what stands above: brackets, ``else``, ``end``.
CLOSER = re.compile(r"[\])}{(]|(?:end|else|elif|elsif|except|catch|finally|fi|done|esac|then|do)\b")
COMMENT = re.compile(r"#|//|/\*|\*|--|;|%|@|<!--|'''|\"\"\"")

DEFINITION = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Outline:
    """Cuts as (offset, cost) in order; spans to keep whole; (offset, name of what begins there)."""

    cuts: list[Place]
    wholes: list[tuple[int, int]]
    names: list[tuple[int, str]]

    def places(self, start: int, end: int, fits: Callable[[int, int], bool]) -> Iterator[Place]:
        """The cuts between ``start`` and ``end``; inside of what fits whole they cost TORN more."""
        kept = -1  # end of the outermost definition that fits
        number = 0
        for offset, cost in self.cuts[bisect_left(self.cuts, (start, 0.0)) :]:
            if offset >= end:
                return
            while number < len(self.wholes) and self.wholes[number][0] < offset:
                a, b = self.wholes[number]
                if b > max(kept, start) and fits(max(a, start), b):
                    kept = b
                number += 1
            yield offset, cost + (TORN if offset < kept else 0.0)


def code_outline(text: str, language: str | None) -> Outline:
    """The outline of a text.

    Args:
        language: Pygments' alias; "" tries Python; None is no code, and is not parsed.
    """
    if language in ("", "python", "python3", "py") and len(text) <= LARGEST_TREE:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in other people's strings
                tree = ast.parse(text.removeprefix("\ufeff"))
            return _python(text, tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return _indented(text)


def _python(text: str, tree: ast.Module) -> Outline:
    """The outline by the syntax tree."""
    starts = [0, *(match.end() for match in LINE_END.finditer(text)), len(text)]
    rows = [text[a:b].strip() for a, b in pairwise(starts)]
    cost = {
        number: AFTER_BLANK if number and not rows[number - 1] else INSIDE
        for number, row in enumerate(rows)
        if row
    }
    found: list[tuple[int, int, str]] = []  # start, end, name of each definition
    todo: list[tuple[list[ast.stmt], int, str, bool]] = [(tree.body, 0, "", False)]
    while todo:
        body, depth, name, in_function = todo.pop()
        free = body[0].lineno - 1 if depth and body else 0  # lines above belong to others
        for number, statement in enumerate(body):
            first = _first_line(statement, rows, free)
            free = statement.end_lineno or statement.lineno
            defines = isinstance(statement, DEFINITION)
            cost[first] = _cost(depth, defines, in_function, not first or not rows[first - 1])
            if depth and not number:
                cost[first] = FIRST
            inner, function = name, in_function
            if isinstance(statement, DEFINITION):
                inner = f"{name} > {statement.name}" if name else statement.name
                found.append((starts[first], starts[free], inner))
                function = in_function or not isinstance(statement, ast.ClassDef)
            todo += [(block, depth + 1, inner, function) for block in _bodies(statement)]
    found.sort(key=lambda item: (item[0], -item[1]))
    return Outline(
        [(starts[number], price) for number, price in sorted(cost.items())],
        [(start, end) for start, end, _ in found],
        _names(found),
    )


def _first_line(statement: ast.stmt, rows: list[str], free: int) -> int:
    """The line (from 0) where a statement begins, its decorators and comments included."""
    first = statement.lineno
    if isinstance(statement, DEFINITION):
        first = min([first, *(decorator.lineno for decorator in statement.decorator_list)])
    first -= 1
    while first > free and rows[first - 1].startswith("#"):
        first -= 1
    return first


def _bodies(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of statements inside one."""
    for field in ("body", "orelse", "finalbody"):
        if block := getattr(statement, field, None):
            yield block
    for field in ("handlers", "cases"):
        yield from (item.body for item in getattr(statement, field, ()))


def _cost(depth: int, defines: bool, in_function: bool, after_blank: bool) -> float:
    """What a cut before a statement costs."""
    if not depth:
        return 2.0 if defines else 4.0 if after_blank else 8.0
    if not in_function:
        return 6.0 if defines else 10.0
    return min(16.0 + 4.0 * depth, 36.0) - (4.0 if after_blank else 0.0)


def _names(found: list[tuple[int, int, str]]) -> list[tuple[int, str]]:
    """(offset, name of the innermost definition from there on), by sorted definitions."""
    names: dict[int, str] = {}
    opened: list[tuple[int, str]] = []

    def close(until: int) -> None:
        while opened and opened[-1][0] <= until:
            end, _ = opened.pop()
            names[end] = opened[-1][1] if opened else ""

    for start, end, name in found:
        close(start)
        names[start] = name
        opened.append((end, name))
    if found:
        close(max(end for _, end, _ in found))
    return sorted(names.items())


def _indented(text: str) -> Outline:
    """The outline by indentation: a unit is an unindented line with what is indented below it."""
    cuts: list[Place] = []
    wholes: list[tuple[int, int]] = []
    begin, inside = 0, False  # of the open unit; whether it has indented lines
    blank, attached = True, False  # the line above: empty; an unindented comment or attribute
    for offset, line in lines(text):
        bare = line.lstrip(" \t")
        depth = len(line[: len(line) - len(bare)].expandtabs(4)) // 4
        if not bare.strip():
            blank, attached = True, False
            continue
        if line[0] not in " \t" and not CLOSER.match(bare):
            if attached:
                cuts.append((offset, FIRST))
            else:
                if inside:
                    wholes.append((begin, offset))
                begin, inside = offset, False
                cuts.append((offset, 2.0 if blank else 8.0))
            attached = bool(COMMENT.match(bare))
        else:
            inside, attached = True, False
            price = min(16.0 + 4.0 * depth, 36.0) if bare[0] not in ")]}" else INSIDE
            cuts.append((offset, price - (6.0 if blank else 0.0)))
        blank = False
    if inside:
        wholes.append((begin, len(text)))
    return Outline(cuts, wholes, [])
