"""Where to cut: the cheapest total over places that a reader would choose.

In: the words of a text, places with what a cut there costs. Out: ranges of words within the limit.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

from stages.markdown import Block, lines
from stages.splitting.words import Words

#: A sentence's end: a full stop and the like, then white space, then what begins a sentence. The
#: full-width ones of Chinese and Japanese need neither.
SENTENCE = re.compile(
    r"""(?<=[.!?])["')\]*_`]{0,3}[ \t\n\r]+(?=["'(\[*_`]{0,3}[A-Z0-9])"""
    r"""|(?<=[。！？])["'）」』]{0,3}(?![。！？])"""
)

#: What a cut costs at the beginning of ... A chunk costs 20, so 12 cuts more than one for a tie.
COST = {"block": 2.0, "item": 3.0, "label": 0.0, "sentence": 12.0, "line": 16.0, "word": 80.0}
TORN = 400.0  # a cut inside a fence, table or function: only where that itself exceeds the limit
CHUNK = 20.0  # each chunk: few and full ones
RUNT = 15.0  # a chunk under a quarter of the limit, in addition

#: A place and the cost of a cut there; what says them of ``text[start:end]``, given what fits.
Place = tuple[int, float]
Places = Callable[[int, int, Callable[[int, int], bool]], Iterable[Place]]


def block_places(
    text: str, parts: tuple[Block, ...], start: int, end: int, cost: Mapping[str, float] = COST
) -> Iterator[Place]:
    """Beginnings of blocks, lines and sentences between ``start`` and ``end``."""
    previous: Block | None = None
    for block in parts:
        if block.end <= start or block.start >= end:
            previous = block
            continue
        if previous is not None and previous.kind in ("heading", "label"):
            yield block.start, cost["word"]  # a heading stays with what it heads
        else:
            yield block.start, cost.get(block.kind, cost["block"])
        previous = block
        a, b = max(block.start, start), min(block.end, end)
        body = text[a:b]
        if block.kind in ("fence", "table"):
            rows = block.rows or [a + offset for offset, _ in lines(body)]
            yield from ((row, TORN) for row in rows if a < row < b)
            continue
        yield from ((a + offset, cost["line"]) for offset, _ in list(lines(body))[1:])
        yield from ((a + match.end(), cost["sentence"]) for match in SENTENCE.finditer(body))


def cut(
    first: int, last: int, words: Words, limit: int, places: Callable[[], Iterable[Place]]
) -> Iterator[tuple[int, int]]:
    """Word ranges that cover ``first`` to ``last``, each within the limit.

    ``places`` is asked only where there is something to choose.
    """
    if first == last:
        return
    borders = [first, *sorted(i for i in words.forced if first < i < last), last]
    if len(borders) == 2 and words.tokens(first, last) <= limit:
        yield first, last
        return
    costs = _costs(words, places())
    for a, b in pairwise(borders):
        if words.tokens(a, b) <= limit:
            yield a, b
        else:
            yield from _cheapest(a, b, costs, words, limit)


def nested(
    first: int, last: int, words: Words, limit: int, places: Callable[[], Iterable[Place]]
) -> Iterator[tuple[int, int]]:
    """As :func:`cut`, but a cheaper kind of place goes before any of a dearer kind.

    What lies between places of one kind is joined as long as it fits; what does not fit by itself
    is cut at places of the next kind, and at last anywhere.
    """
    costs = _costs(words, places())
    kinds = [sorted(i for i in costs if costs[i] == kind) for kind in sorted({*costs.values()})]

    def pieces(a: int, b: int, kind: int) -> Iterator[tuple[int, int]]:
        if kind == len(kinds):
            yield from greedy(a, b, words, limit)
            return
        inside = kinds[kind][bisect_right(kinds[kind], a) : bisect_left(kinds[kind], b)]
        start = a
        for p, q in pairwise([a, *inside, b]):
            if words.tokens(start, q) <= limit:
                continue
            if start < p:
                yield start, p
            start = p
            if words.tokens(p, q) > limit:
                yield from pieces(p, q, kind + 1)
                start = q
        if start < b:
            yield start, b

    borders = [first, *sorted(i for i in words.forced if first < i < last), last]
    for a, b in pairwise(borders):
        yield from pieces(a, b, 0)


def _costs(words: Words, places: Iterable[Place]) -> dict[int, float]:
    """Number of the word that a cut comes before -> what it costs."""
    costs: dict[int, float] = {}
    for offset, cost in places:
        number = bisect_left(words.starts, offset)
        costs[number] = min(cost, costs.get(number, cost))
    return costs


def greedy(first: int, last: int, words: Words, limit: int) -> Iterator[tuple[int, int]]:
    """Word ranges that cover ``first`` to ``last``, each as full as the limit allows."""
    borders = [first, *sorted(i for i in words.forced if first < i < last), last]
    for a, b in pairwise(borders):
        while a < b:
            end = min(b, bisect_right(words.total, words.total[a] + limit) - 1)
            yield a, end
            a = end


def _cheapest(
    first: int, last: int, costs: dict[int, float], words: Words, limit: int
) -> Iterator[tuple[int, int]]:
    """The cheapest way to cut words ``first`` to ``last``: dynamic programming over places."""
    places = _reachable(first, last, costs, words, limit)
    before = [words.total[number] for number in places]  # tokens before each place
    base = [CHUNK]  # the least total with a cut at each place, the next chunk's cost included
    back = [0]
    left = full = 0  # of the places before j: within the limit; the first that leaves a runt
    for j in range(1, len(places)):
        here = before[j]
        while here - before[left] > limit:
            left += 1
        while full < left or (full < j and (here - before[full]) * 4 >= limit):
            full += 1
        choice = min(base[left:full], default=float("inf"))
        origin = base.index(choice, left) if full > left else j
        if full < j and (short := min(base[full:j])) + RUNT < choice:
            choice, origin = short + RUNT, base.index(short, full)
        back.append(origin)
        base.append(choice + CHUNK + costs.get(places[j], COST["word"]))
    ends = [len(places) - 1]
    while ends[-1]:
        ends.append(back[ends[-1]])
    for a, b in zip(ends[::-1], ends[-2::-1], strict=False):
        yield places[a], places[b]


def _reachable(
    first: int, last: int, costs: dict[int, float], words: Words, limit: int
) -> list[int]:
    """The places between ``first`` and ``last`` (both included), none further than the limit.

    Where no place is near enough, any word may be one; on a long stretch without any, a word every
    sixteenth of the limit, or a line of 50 MB would take minutes.
    """
    places = [first]
    for number in [*sorted(i for i in costs if first < i < last), last]:
        gap = words.tokens(places[-1], number)
        if gap > 4 * limit:
            while (
                near := bisect_right(words.total, words.total[places[-1]] + limit // 16) - 1
            ) < number:
                places.append(max(near, places[-1] + 1))
            if places[-1] >= number:  # the last step was one long word
                places.pop()
        elif gap > limit:
            places.extend(range(places[-1] + 1, number))
        places.append(number)
    return places
