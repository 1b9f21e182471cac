"""Cutting one text into spans of at most so many tokens, without ever touching the text.

In: a text, the limit, a token counter. Out: spans (start, end, tokens, heading) such that every
non-space character lies in exactly one, and ``tokens`` is what the tokenizer says of
``text[start:end]``.

How it stays exact and fast. BERT's tokenizer never joins characters across white space, so the
tokens of a text are the sum over its white-space separated words; a word's count is looked up once
and remembered (documents repeat their words: 9 of 10 are known). Cuts are chosen among places that
a reader would choose, by the cheapest total of :data:`COST`, section by section.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from stages.markdown import Block, Section, blocks, lines, sections

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Only what is white space to Python and to the tokenizer alike separates words.
WORD = re.compile(r"[^ \t\n\r]+")

#: A sentence's end: a full stop and the like, then white space, then what begins a sentence.
SENTENCE = re.compile(r"""(?<=[.!?])["')\]*_`]{0,3}[ \t\n\r]+(?=["'(\[*_`]{0,3}[A-Z0-9])""")

#: What a cut costs at the beginning of ... A chunk costs 20, so 12 cuts more than one for a tie.
COST = {"block": 2.0, "item": 3.0, "label": 0.0, "sentence": 12.0, "line": 16.0, "word": 80.0}
TORN = 400.0  # a cut inside a fence or table: only where the block itself exceeds the limit
CHUNK = 20.0  # each chunk: few and full ones
RUNT = 15.0  # a chunk under a quarter of the limit, in addition

#: The tokenizer reads a word of over 100 characters as one unknown token; one such word (an
#: encoded image, say) is cut after so many characters, lest a chunk grow without bound.
LONG_WORD = 1024


@dataclass(frozen=True)
class Span:
    """``text[start:end]`` and its tokens; ``heading`` is the path of headings above it."""

    start: int
    end: int
    tokens: int
    heading: str


@dataclass
class WordCounter:
    """Tokens of words under one tokenizer, remembered across documents."""

    tokenizer: Tokenizer
    known: dict[str, int] = field(default_factory=dict)

    def learn(self, words: Iterable[str]) -> None:
        """Count words that are not known yet, in one call of the tokenizer."""
        new = [word for word in set(words) if word not in self.known]
        if len(self.known) > 1_000_000:
            self.known.clear()
            new = list(set(words))
        encodings = self.tokenizer.encode_batch(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self.known[word] = len(encoding.ids)


@dataclass(frozen=True)
class Words:
    """The words of one text. ``total[i]`` is the tokens before word ``i``."""

    starts: list[int]
    ends: list[int]
    total: list[int]
    forced: set[int]  # a cut must come before these words: pieces of a word that is too long

    def tokens(self, first: int, last: int) -> int:
        """Tokens of the words ``first`` up to ``last``, exclusive."""
        return self.total[last] - self.total[first]


def split(text: str, limit: int, counter: WordCounter, markdown: bool) -> list[Span]:
    """Spans of ``text`` of at most ``limit`` tokens, in order.

    Args:
        limit: tokens under the counter's tokenizer, special ones excluded; at least 4.
        markdown: headings are hard borders; otherwise the text is a docstring, whose sections
            (``Args:``) are preferred places to cut.
    """
    spans = _markdown(text, limit, counter) if markdown else _docstring(text, limit, counter)
    return [span for span in spans if text[span.start : span.end].strip()]


def _markdown(text: str, limit: int, counter: WordCounter) -> Iterator[Span]:
    """Spans section by section; a section reaches to the beginning of the next."""
    words = read_words(text, limit, counter)
    found = sections(text) or [Section("", 0, len(text), ())]
    borders = [0, *(section.start for section in found[1:]), len(text)]
    for section, (start, end) in zip(found, pairwise(borders), strict=True):
        first, last = bisect_left(words.starts, start), bisect_left(words.starts, end)
        for a, b in _pieces(text, first, last, section.blocks, words, limit):
            yield _span(a, b, words, section.heading)


def _docstring(text: str, limit: int, counter: WordCounter) -> Iterator[Span]:
    """Spans of the whole text; the heading is the docstring's section that a span begins in."""
    words = read_words(text, limit, counter)
    parts = tuple(blocks(text, markdown=False))
    labels = [block for block in parts if block.kind == "label"]
    borders = [block.start for block in labels]
    for a, b in _pieces(text, 0, len(words.starts), parts, words, limit):
        here = bisect_left(borders, words.starts[a] + 1) - 1
        yield _span(a, b, words, labels[here].name if here >= 0 else "")


def _span(first: int, last: int, words: Words, heading: str) -> Span:
    start, end = words.starts[first], words.ends[last - 1]
    return Span(start, end, words.tokens(first, last), heading)


def read_words(text: str, limit: int, counter: WordCounter) -> Words:
    """The words of a text and their tokens; a word over the limit becomes several."""
    found = [(match.start(), match.end()) for match in WORD.finditer(text)]
    names = [text[start:end] for start, end in found]
    counter.learn(names)
    starts: list[int] = []
    ends: list[int] = []
    total: list[int] = [0]
    forced: set[int] = set()
    for (start, end), name in zip(found, names, strict=True):
        count = counter.known[name]
        if count <= limit and end - start <= LONG_WORD:
            parts = [(start, end, count, False)]
        else:
            parts = [
                (start + a, start + b, n, hard)
                for a, b, n, hard in _cut_word(name, limit, counter.tokenizer)
            ]
        for a, b, n, hard in parts:
            if hard:
                forced.add(len(starts))
            starts.append(a)
            ends.append(b)
            total.append(total[-1] + n)
    return Words(starts, ends, total, forced)


def _cut_word(word: str, limit: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int, bool]]:
    """(start, end, tokens, a cut must come before it) of the parts of an overlong word.

    The tokenizer's own words (punctuation and CJK characters stand alone) may be parted anywhere
    without changing a token. Inside one of them the rest becomes a word of its own, so a cut is
    forced there and the rest is counted anew.
    """
    start, hard = 0, False
    while start < len(word):
        window = word[start : start + LONG_WORD]
        encoding = tokenizer.encode(window, add_special_tokens=False)
        ids, offsets, owners = encoding.ids, encoding.offsets, encoding.word_ids
        if len(ids) <= limit and start + len(window) == len(word):
            yield start, len(word), len(ids), hard
            return
        inside = range(1, min(limit + 1, len(ids)))
        edges = [i for i in inside if owners[i] != owners[i - 1] and offsets[i][0]]
        if edges:  # between two of the tokenizer's words
            end, count, next_hard = start + offsets[edges[-1]][0], edges[-1], False
        else:  # inside one
            end = start + (offsets[limit][0] if limit < len(ids) else len(window))
            end = max(start + 1, end)
            count = len(tokenizer.encode(word[start:end], add_special_tokens=False).ids)
            next_hard = True
        yield start, end, count, hard
        start, hard = end, next_hard


def _pieces(
    text: str, first: int, last: int, parts: tuple[Block, ...], words: Words, limit: int
) -> Iterator[tuple[int, int]]:
    """Word ranges that cover ``first`` to ``last``, each within the limit."""
    if first == last:
        return
    borders = [first, *sorted(i for i in words.forced if first < i < last), last]
    if len(borders) == 2 and words.tokens(first, last) <= limit:
        yield first, last
        return
    costs = _candidates(text, parts, words)
    for a, b in pairwise(borders):
        if words.tokens(a, b) <= limit:
            yield a, b
        else:
            yield from _cheapest(a, b, costs, words, limit)


def _candidates(text: str, parts: tuple[Block, ...], words: Words) -> dict[int, float]:
    """Word number -> cost of a cut before it, for the places that a reader would choose."""
    costs: dict[int, float] = {}

    def offer(offset: int, cost: float) -> None:
        number = bisect_left(words.starts, offset)
        costs[number] = min(cost, costs.get(number, cost))

    for previous, block in zip((None, *parts), parts, strict=False):
        cost = COST.get(block.kind, COST["block"])
        if previous is not None and previous.kind in ("heading", "label"):
            cost = COST["word"]  # a heading stays with what it heads
        offer(block.start, cost)
        whole = block.kind in ("fence", "table")
        body = text[block.start : block.end]
        for offset, _ in list(lines(body))[1:]:
            offer(block.start + offset, TORN if whole else COST["line"])
        if not whole:
            for match in SENTENCE.finditer(body):
                offer(block.start + match.end(), COST["sentence"])
    return costs


def _cheapest(
    first: int, last: int, costs: dict[int, float], words: Words, limit: int
) -> Iterator[tuple[int, int]]:
    """The cheapest way to cut words ``first`` to ``last``: dynamic programming over candidates."""
    places = [first]
    for number in [*sorted(i for i in costs if first < i < last), last]:
        if words.tokens(places[-1], number) > limit:  # no candidate is near enough: any word
            places.extend(range(places[-1] + 1, number))
        places.append(number)
    best: list[float] = [0.0]
    back: list[int] = [0]
    left = 0
    for j in range(1, len(places)):
        while words.tokens(places[left], places[j]) > limit:
            left += 1
        choice, origin = float("inf"), left
        for i in range(left, j):
            tokens = words.tokens(places[i], places[j])
            cost = best[i] + CHUNK + (RUNT if tokens * 4 < limit else 0.0)
            if i:
                cost += costs.get(places[i], COST["word"])
            if cost < choice:
                choice, origin = cost, i
        best.append(choice)
        back.append(origin)
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(back[cuts[-1]])
    for a, b in zip(cuts[::-1], cuts[-2::-1], strict=False):
        yield places[a], places[b]
