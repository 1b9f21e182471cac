"""The outline of source code: where a reader would cut it, and what should stay whole.

Python is read by its own parser; other languages, and Python that does not parse, by indentation
and empty lines. Decorators and the comment lines right above belong to what they stand before.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from stages.markdown import lines
from stages.splitting.cuts import Place

#: Larger files are read by indentation: a syntax tree takes some 100 times the memory of its text.
LARGEST_TREE = 2_000_000

#: Kinds of places, the best first: a definition; a statement after an empty line; any other; a
#: definition that begins a body, whose head it stands below. First those of depth 0, then the same
#: of depth 1, and so on: what lies deeper is cut only where the whole around it exceeds the limit.
#: Depth is nested statements, or columns of indentation.
DEFINED, AFTER_BLANK, OTHER, HEADED, KINDS = range(5)
DEEPEST = 40
#: Behind all of these: a line inside a statement, after an empty line and any other, and a plain
#: statement that begins a body: it stays with its head.
INSIDE = (DEEPEST + 1) * KINDS
FIRST = INSIDE + KINDS

LINE_END = re.compile(r"\r\n|\r|\n")  # what the parser counts as lines
#: Lines without indentation that go on with what stands above: brackets, ``else``, ``end``.
CLOSER = re.compile(r"[\])}{(]|(?:end|else|elif|elsif|except|catch|finally|fi|done|esac|then|do)\b")
COMMENT = re.compile(r"#|//|/\*|\*|--|;|%|@|<!--|'''|\"\"\"")

DEFINITION = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Outline:
    """Places in order; (offset, name of what begins there)."""

    cuts: list[Place]
    names: list[tuple[int, str]]

    def places(self, start: int, end: int) -> list[Place]:
        """The places between ``start`` and ``end``."""
        return [place for place in self.cuts if start <= place[0] < end]


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
    kinds = {
        number: INSIDE + (AFTER_BLANK if number and not rows[number - 1] else OTHER)
        for number, row in enumerate(rows)
        if row
    }
    found: list[tuple[int, int, str]] = []  # start, end, name of each definition
    todo: list[tuple[list[ast.stmt], int, str]] = [(tree.body, 0, "")]
    while todo:
        body, depth, name = todo.pop()
        free = body[0].lineno - 1 if depth and body else 0  # lines above belong to others
        for number, statement in enumerate(body):
            first = _first_line(statement, rows, free)
            free = statement.end_lineno or statement.lineno
            inner, begins = name, depth > 0 and number == 0
            if isinstance(statement, DEFINITION):
                inner = f"{name} > {statement.name}" if name else statement.name
                found.append((starts[first], starts[free], inner))
                kinds[first] = _kind(depth, HEADED if begins else DEFINED)
            else:
                kind = OTHER if first and rows[first - 1] else AFTER_BLANK
                kinds[first] = FIRST if begins else _kind(depth, kind)
            todo += [(block, depth + 1, inner) for block in _bodies(statement)]
    found.sort(key=lambda item: (item[0], -item[1]))
    return Outline(
        [
            (starts[number], kind, kind < INSIDE and kind % KINDS == HEADED)
            for number, kind in sorted(kinds.items())
        ],
        _names(found),
    )


def _kind(depth: int, kind: int) -> int:
    return min(depth, DEEPEST) * KINDS + kind


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
    blank, attached = True, False  # the line above: empty; an unindented comment or attribute
    for offset, line in lines(text):
        bare = line.lstrip(" \t")
        if not bare.strip():
            blank, attached = True, False
            continue
        if line[0] not in " \t" and not CLOSER.match(bare):
            kind = DEFINED if blank else OTHER
            cuts.append((offset, FIRST if attached else kind, False))
            attached = bool(COMMENT.match(bare))
        else:
            columns = len(line[: len(line) - len(bare)].expandtabs(4))
            kind = AFTER_BLANK if blank else OTHER
            closes = bare[0] in ")]}"
            cuts.append((offset, INSIDE + kind if closes else _kind(1 + columns, kind), False))
            attached = False
        blank = False
    return Outline(cuts, [])
