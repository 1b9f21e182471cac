"""What a strategy makes of a text: parts with hard borders, and places for cuts inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from stages.markdown import Block, Section, blocks, paragraphs, sections
from stages.splitting.code import code_outline
from stages.splitting.cuts import Places, block_places
from stages.splitting.plain import plain_sections


class Heading(Protocol):
    """``contracts.records.Heading``."""

    @property
    def level(self) -> int: ...
    @property
    def title(self) -> str: ...
    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """``text[start:end]``, cut without regard to its neighbours; parts cover the text.

    ``places`` is None where the limit alone decides. ``labels`` are (offset, heading) inside it:
    the one that a span begins under replaces ``heading``.
    """

    start: int
    end: int
    heading: str
    places: Places | None
    labels: Sequence[tuple[int, str]] = ()


def find_parts(
    text: str, format: str, strategy: str, language: str, headings: Sequence[Heading]
) -> list[Part]:
    """The parts of a text, in order; at least one."""
    whole = len(text)
    if strategy == "fixed":
        return [Part(0, whole, "", None)]
    if strategy == "recursive":
        return [Part(0, whole, "", _places(text, tuple(paragraphs(text))))]
    if strategy == "code" or format == "code":
        outline = code_outline(text, language if format == "code" else None)
        return [Part(0, whole, "", outline.places, outline.names)]
    if format == "docstring":
        found = tuple(blocks(text, markdown=False))
        labels = [(block.start, block.name) for block in found if block.kind == "label"]
        return [Part(0, whole, "", _places(text, found), labels)]
    of_text = sections(text) if format == "markdown" else plain_sections(text, headings)
    return _section_parts(text, of_text)


def _section_parts(text: str, found: list[Section]) -> list[Part]:
    """A section reaches to the beginning of the next."""
    found = found or [Section("", 0, len(text), ())]
    borders = [0, *(section.start for section in found[1:]), len(text)]
    return [
        Part(start, end, section.heading, _places(text, section.blocks))
        for section, (start, end) in zip(found, pairwise(borders), strict=True)
    ]


def _places(text: str, found: tuple[Block, ...]) -> Places:
    return lambda start, end: block_places(text, found, start, end)
