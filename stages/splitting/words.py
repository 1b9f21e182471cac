"""The words of a text and what each costs in tokens.

BERT's tokenizer never joins characters across white space, so the tokens of a text are the sum over
its white-space separated words; a word's count is looked up once and remembered (documents repeat
their words: 9 of 10 are known).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Only what is white space to Python and to the tokenizer alike separates words. The full stops of
#: Chinese and Japanese end one as well: the tokenizer lets them stand alone, and so sentences can
#: be told apart where no white space stands between them.
WORD = re.compile(r"[^ \t\n\r。！？]+[。！？]*|[。！？]+")

#: The tokenizer reads a word of over 100 characters as one unknown token; one such word (an
#: encoded image, say) is cut after so many characters, lest a chunk grow without bound.
LONG_WORD = 1024

#: Words remembered: about 150 MB.
REMEMBERED = 1_000_000


@dataclass
class WordCounter:
    """Tokens of words under one tokenizer, remembered across documents.

    Raises ConfigError for a tokenizer that is not BERT's: its words could not be counted alone.
    """

    tokenizer: Tokenizer
    known: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = json.loads(self.tokenizer.to_str())
        kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer")]
        if kinds != ["BertNormalizer", "BertPreTokenizer"]:
            raise ConfigError(
                f"The embedding model's tokenizer is not BERT's: {kinds[0]}, {kinds[1]}.",
                where="params.yaml: vectors.model",
                next="use a BERT model (all-MiniLM-L6-v2, bge, e5, gte …)",
            )

    def learn(self, words: Iterable[str]) -> None:
        """Count words that are not known yet, in one call of the tokenizer."""
        every = set(words)
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = [word for word in every.difference(self.known) if len(word) <= LONG_WORD]
        encodings = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self.known.update(zip(new, map(len, encodings), strict=True))


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


def read_words(text: str, start: int, end: int, limit: int, counter: WordCounter) -> Words:
    """The words of ``text[start:end]`` and their tokens; a word over the limit becomes several."""
    names = WORD.findall(text, start, end)
    if not names:
        return Words([], [], [0], set())
    counter.learn(names)
    spans = [match.span() for match in WORD.finditer(text, start, end)]
    counts = [counter.known.get(name, limit + 1) for name in names]  # unknown: a long word
    if max(counts) > limit:
        return _cut_words(text, spans, counts, limit, counter.tokenizer)
    starts, ends = zip(*spans, strict=True)
    return Words(list(starts), list(ends), list(accumulate(counts, initial=0)), set())


def _cut_words(
    text: str, spans: list[tuple[int, int]], counts: list[int], limit: int, tokenizer: Tokenizer
) -> Words:
    """As :func:`read_words`, where some words have to be cut."""
    words = Words([], [], [0], set())
    for (start, end), count in zip(spans, counts, strict=True):
        parts: Iterable[tuple[int, int, int, bool]] = [(0, end - start, count, False)]
        if count > limit:
            parts = _cut_word(text[start:end], limit, tokenizer)
        for a, b, n, hard in parts:
            if hard:
                words.forced.add(len(words.starts))
            words.starts.append(start + a)
            words.ends.append(start + b)
            words.total.append(words.total[-1] + n)
    return words


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
        offsets, owners = encoding.offsets, encoding.word_ids
        edges = [i for i in range(1, len(offsets)) if owners[i] != owners[i - 1] and offsets[i][0]]
        last = start + len(window) == len(word)
        begin = first = 0  # of the next part: character in the window, token
        for edge, following in zip(edges, [*edges, len(offsets)][1:], strict=True):
            if following - first > limit and 0 < edge - first <= limit:
                yield start + begin, start + offsets[edge][0], edge - first, hard
                begin, first, hard = offsets[edge][0], edge, False
        if last and len(offsets) - first <= limit:
            yield start + begin, len(word), len(offsets) - first, hard
            return
        if begin:
            start += begin
        elif edges and edges[-1] <= limit:  # what reaches the window's end may go on behind it
            yield start, start + offsets[edges[-1]][0], edges[-1], hard
            start, hard = start + offsets[edges[-1]][0], False
        else:  # inside one of the tokenizer's words
            end = start + (offsets[limit][0] if limit < len(offsets) else len(window))
            end = max(start + 1, end)
            count = len(tokenizer.encode(word[start:end], add_special_tokens=False).ids)
            yield start, end, count, hard
            start, hard = end, True
