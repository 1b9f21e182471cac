"""Cutting one text into spans of at most so many tokens, without ever touching the text.

In: a text and how it is structured, the limit, a token counter. Out: spans (start, end, tokens,
heading) such that every non-space character lies in exactly one, and ``tokens`` is what the
tokenizer says of ``text[start:end]``.

A strategy says where hard borders are and of what kind the places between them are (``parts``); the
tokens come from ``words``, each text tokenised once; ``cuts`` takes the best kind of place that
makes a piece fit. A text is read in windows of :data:`WINDOW` characters, so that memory follows
from the window and not from the text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.splitting.cuts import cut, greedy
from stages.splitting.parts import Heading, Part, find_parts
from stages.splitting.words import WordCounter, Words, read_words

__all__ = ["Span", "Strategy", "WordCounter", "split"]

Strategy = Literal["structure", "recursive", "fixed", "code"]

#: Characters of a text that are looked at together; few documents are longer.
WINDOW = 1 << 20


@dataclass(frozen=True)
class Span:
    """``text[start:end]`` and its tokens; ``heading`` is the path of headings above it."""

    start: int
    end: int
    tokens: int
    heading: str


def split(
    text: str,
    limit: int,
    counter: WordCounter,
    *,
    format: str,
    strategy: Strategy = "structure",
    language: str = "",
    headings: Sequence[Heading] = (),
) -> list[Span]:
    """Spans of ``text`` of at most ``limit`` tokens, in order.

    Args:
        limit: tokens under the counter's tokenizer, special ones excluded; at least 16.
        format: as ``contracts.records.Document``; so are ``language`` and ``headings``.
        strategy: ``structure`` follows the format, ``recursive`` knows paragraphs, lines,
            sentences and words alone, ``fixed`` fills the limit, ``code`` keeps classes and
            functions whole.
    """
    parts = find_parts(text, format, strategy, language, headings)
    spans: list[Span] = []
    for start, end in _windows(text, [part.start for part in parts]):
        words = read_words(text, start, end, limit, counter)
        for part in _overlapping(parts, start, end):
            spans += _part_spans(part, max(start, part.start), min(end, part.end), words, limit)
    return [span for span in spans if text[span.start : span.end].strip()]


def _part_spans(part: Part, start: int, end: int, words: Words, limit: int) -> Iterator[Span]:
    """Spans of what lies of ``part`` between ``start`` and ``end``."""
    first, last = bisect_left(words.starts, start), bisect_left(words.starts, end)
    places = part.places
    if places is None:
        ranges = greedy(first, last, words, limit)
    else:
        ranges = cut(first, last, words, limit, lambda: places(start, end))
    for a, b in ranges:
        begin = words.starts[a]
        here = bisect_right(part.labels, begin, key=lambda label: label[0]) - 1
        heading = part.labels[here][1] if here >= 0 else part.heading
        yield Span(begin, words.ends[b - 1], words.tokens(a, b), heading)


def _windows(text: str, borders: list[int]) -> Iterator[tuple[int, int]]:
    """(start, end) that cover the text, each at most :data:`WINDOW` long.

    They end where a part begins, else at an empty line, a line or white space in their second half,
    else anywhere.
    """
    start = 0
    while len(text) - start > WINDOW:
        half, full = start + WINDOW // 2, start + WINDOW
        border = borders[bisect_right(borders, full) - 1]
        ends = [border if border > half else -1]
        ends += [text.rfind(mark, half, full) + 1 for mark in ("\n\n", "\n", " ", "\t", "\r")]
        end = next((end for end in ends if end > half), full)
        yield start, end
        start = end
    yield start, len(text)


def _overlapping(parts: list[Part], start: int, end: int) -> Iterator[Part]:
    number = max(bisect_right(parts, start, key=lambda part: part.start) - 1, 0)
    while number < len(parts) and parts[number].start < end:
        yield parts[number]
        number += 1
