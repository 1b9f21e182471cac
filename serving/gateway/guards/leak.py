"""What must not come out: the system prompt, word for word, and canary strings.

Both work on streams and hold back what may still become a finding: ``Literals`` the beginning of a
canary, ``PromptParts`` up to ``words`` words that stand in the system prompt in that order.
A system prompt that the model retells in other words, or encodes, is not found.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from contracts.errors import ConfigError
from serving.gateway.guards.normalise import normalise
from serving.gateway.guards.patterns import Piece
from serving.gateway.guards.recent import Recent

#: Words of system prompts that are remembered, and the longest word and gap inside a leak.
INDEXED, LONGEST, GAP = 4096, 64, 32
_WORD = re.compile(r"\w+")
MIN_CANARY = 8
#: Fewer words in a row are everyday language.
MIN_WORDS = 6


class Index(dict[str, tuple[int, ...]]):
    """Word -> its places in the system prompts, counted from 1. Places of two prompts do not
    follow each other."""

    count = 0  # words

    def may_stand_in(self, text: str, words: int) -> bool:
        """Whether ``words`` words in a row are words of the prompts, in any order: 15 us for 500
        characters, where PromptParts takes 200."""
        if not text.isascii():
            return True
        known = bytes(map(self.__contains__, _WORD.findall(text.lower())))
        return b"\1" * words in known


class _Waiting(ABC):
    """``feed`` pieces of a text, take settled ones; ``close`` settles the rest."""

    _text = ""  # what waits

    @property
    def held(self) -> int:
        return len(self._text)

    def feed(self, text: str) -> list[Piece]:
        return self._settle(text, False)

    def close(self) -> list[Piece]:
        return self._settle("", True)

    @abstractmethod
    def _settle(self, text: str, last: bool) -> list[Piece]: ...


class Literals(_Waiting):
    """Exact strings. None of them stands inside another, so of two the first is meant."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._shape = re.compile("|".join(map(re.escape, strings)))

    def _settle(self, text: str, last: bool) -> list[Piece]:
        self._text += text
        pieces, done = [], 0
        for match in self._shape.finditer(self._text):
            if match.start() > done:
                pieces.append(Piece(self._text[done : match.start()]))
            pieces.append(Piece(match.group(), "canary"))
            done = match.end()
        cut = len(self._text) if last else max(done, self._may_begin())
        if cut > done:
            pieces.append(Piece(self._text[done:cut]))
        self._text = self._text[cut:]
        return pieces

    def _may_begin(self) -> int:
        """Where the longest beginning of a string at the end of the text stands."""
        text = self._text
        for size in range(min(len(text), max(map(len, self._strings)) - 1), 0, -1):
            tail = text[-size:]
            if any(string.startswith(tail) for string in self._strings):
                return len(text) - size
        return len(text)


def read_canaries(value: str, where: str) -> tuple[str, ...]:
    """The strings of a variable's value. Raises ConfigError for those that would find anything."""
    strings = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    wrong = [
        f"number {place + 1}"
        for place, one in enumerate(strings)
        if len(one) < MIN_CANARY or any(one != other and one in other for other in strings)
    ]
    if wrong:
        raise ConfigError(
            f"A canary has {MIN_CANARY} characters or more and stands in no other one.",
            where=f"the environment variable {where}",
            next="make each with: python -c 'import secrets; print(secrets.token_hex(8))'",
            offenders=wrong,
        )
    return strings


class PromptIndex:
    """Where the words of system prompts stand."""

    def __init__(self) -> None:
        self._known: Recent[Index] = Recent(64)

    def __call__(self, prompts: Iterable[str]) -> Index:
        prompts = list(prompts)
        key = blake2b("\0".join(prompts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self._known.get(key, lambda: _indexed(prompts))


def _indexed(prompts: list[str]) -> Index:
    places: dict[str, list[int]] = {}
    count, place = 0, 1
    for prompt in prompts:
        for match in _WORD.finditer(normalise(prompt[: INDEXED * 8])):
            if count < INDEXED:
                places.setdefault(match.group(), []).append(place)
            count, place = count + 1, place + 1
        place += 1
    index = Index({word: tuple(found) for word, found in places.items() if len(word) <= LONGEST})
    index.count = min(count, INDEXED)
    return index


class PromptParts(_Waiting):
    """Runs of ``words`` or more words that stand in the system prompt in the same order.

    Words are compared as normalised. A word of over LONGEST characters, or a gap of over GAP,
    ends a run, so what waits is bounded by ``words * (LONGEST + GAP)`` characters.
    """

    def __init__(self, index: Index, words: int) -> None:
        self._index, self._words = index, words
        self._base = 0  # where in the whole text begins what waits
        # Places in the whole text from here on.
        self._at = 0  # up to here its words are known
        self._end = 0  # where the last matching word ended
        self._starts: list[int] = []  # where the words of the longest run begin
        self._runs: dict[int, int] = {}  # place in the prompt -> words of the run that ends there
        self._leaking = self._again = self._in_word = False
        self._out: list[Piece] = []

    def _settle(self, text: str, last: bool) -> list[Piece]:
        self._text += text
        self._out = []
        stop = self._base + len(self._text)
        begun = self._read(stop, last)
        if self._runs and begun - self._end > GAP:
            self._stop()
        if last:
            self._stop()
            self._emit(stop)
        elif not self._runs:
            self._emit(begun)
        elif self._leaking:
            self._emit(self._end, "system_prompt")
        else:
            self._emit(self._starts[0])
        return self._out

    def _read(self, stop: int, last: bool) -> int:
        """Take the words that are whole; returns where what is not begins."""
        base, text = self._base, self._text
        if self._in_word:  # go past the rest of a word that is too long
            rest = _WORD.match(text, self._at - base)
            self._at = base + rest.end() if rest else self._at
            self._in_word = self._at == stop
        for match in _WORD.finditer(text, self._at - base):
            start, end = base + match.start(), base + match.end()
            if end == stop and not last:
                if end - start <= LONGEST:
                    return start
                self._in_word = True
            self._word(match.group(), start, end)
            self._at = end
        return stop

    def _word(self, word: str, start: int, end: int) -> None:
        if self._runs and start - self._end > GAP:
            self._stop()
        runs = self._runs
        places = self._index.get(normalise(word), ()) if len(word) <= LONGEST else ()
        self._runs = {place: runs.get(place - 1, 0) + 1 for place in places}
        longest = max(self._runs.values(), default=0)
        if longest < self._words and self._leaking:
            self._emit(self._end, "system_prompt")
            self._leaking = False
        self._starts = [*self._starts, start][-longest:] if longest else []
        if longest:
            self._end = end
        if longest >= self._words and not self._leaking:
            self._emit(self._starts[0])
            self._leaking, self._again = True, False

    def _stop(self) -> None:
        """The run is over."""
        if self._leaking:
            self._emit(self._end, "system_prompt")
        self._leaking, self._runs, self._starts = False, {}, []

    def _emit(self, upto: int, kind: str | None = None) -> None:
        count = upto - self._base
        if count > 0:
            self._out.append(Piece(self._text[:count], kind, self._again and kind is not None))
            self._text, self._base = self._text[count:], upto
            self._again = kind is not None
