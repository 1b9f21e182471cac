"""Sentences of a chunk, as a prompt shows them.

In: the chunk's own text, line breaks included. Out: its sentences, list items, table rows and
lines of code, whitespace collapsed, in order. Headings and rules are left out: a passage carries
its heading path beside the text. Every sentence stands in the chunk word for word.
"""

from __future__ import annotations

import re

MIN_LETTERS = 12  # shorter pieces ("See also:", "```") answer nothing

_HEADING = re.compile(r"#{1,6} ")
_RULE = re.compile(r"[\s|:=~`*-]+$")
_ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|etc|approx|no)|\b[A-Z])\.$", re.I)
_END = re.compile(r"(?<=[.?!])[\"')\]]*\s+(?=\S)")


def sentences(text: str) -> list[str]:
    """The sentences of ``text`` that could answer something, in order."""
    found = [piece for block in _blocks(text) for piece in _split(block)]
    return [piece for piece in found if sum(map(str.isalpha, piece)) >= MIN_LETTERS]


def _blocks(text: str) -> list[str]:
    """Paragraphs, list items, table rows and code lines, each on one line."""
    blocks: list[str] = []
    open_paragraph = fenced = False
    for raw in text.splitlines():
        line = " ".join(raw.split())
        if line.startswith(("```", "~~~")):
            fenced, open_paragraph = not fenced, False
        elif not line or _HEADING.match(line) or _RULE.match(line):
            open_paragraph = False
        elif fenced or line.startswith("|"):
            blocks.append(line)
            open_paragraph = False
        elif open_paragraph and not _ITEM.match(line):
            blocks[-1] += " " + line
        else:
            blocks.append(line)
            open_paragraph = True
    return blocks


def _split(block: str) -> list[str]:
    """One block at the ends of its sentences; an abbreviation's full stop is none."""
    if block.startswith("|"):
        return [block]
    pieces: list[str] = []
    start = 0
    for match in _END.finditer(block):
        if _ABBREVIATION.search(block[start : match.start()]):
            continue
        pieces.append(block[start : match.end()].strip())
        start = match.end()
    return [piece for piece in [*pieces, block[start:].strip()] if piece]
