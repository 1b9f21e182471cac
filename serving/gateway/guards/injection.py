"""Prompt injection by rule: what tries to take the instructions over, or to get them out.

Each text is read as its normalised copy and as whatever it hides (normalise.py); the original is
what is forwarded. Hits are worth 1 or 2 (rules.py), each rule once; one that is encoded is worth
one more, since honest people do not encode such sentences; one that stands in quotation marks is
worth one less, since honest people quote them. A text is refused at ``threshold``.

This is a heuristic. It finds what is phrased like the known attacks, it does not understand.
benchmarks/guards.py says how much it finds, and how often it is wrong about ordinary questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from serving.gateway.guards.normalise import View, normalise, origin, views
from serving.gateway.guards.rules import RULES, Rule

#: Characters that are read at once, and by which pieces overlap: no phrase is longer.
PIECE, OVERLAP = 8192, 512
#: Views that nobody reads by chance. The others hold the plain text with some signs replaced.
_SEALED = ("base64", "hex", "tags", "rot13", "mirror", "apart")
_QUOTES = ('"', "`")
_AROUND = 80


class Hit(NamedTuple):
    """``rule`` matches at ``start`` of the text, as seen by ``how`` ("" is the plain copy)."""

    rule: str
    worth: int
    start: int
    end: int
    how: str


def _by_trace() -> dict[bool, dict[str, tuple[Rule, ...]]]:
    """data -> trace -> the rules to try."""
    table: dict[bool, dict[str, tuple[Rule, ...]]] = {False: {}, True: {}}
    for data, traces in table.items():
        for rule in RULES:
            if data or not rule.data:
                for trace in rule.traces:
                    traces[trace] = (*traces.get(trace, ()), rule)
    return table


_TRACES = _by_trace()


def hits(text: str, *, data: bool = False) -> list[Hit]:
    """Every rule that matches, as first seen. ``data``: nobody speaks to the model here."""
    copy = normalise(text)
    found: dict[str, Hit] = {}
    for view in chain((View("", copy, 0),), views(text, copy)):
        for hit in _in_view(view, text, data):
            if hit.rule not in found or (hit.how in _SEALED and hit.worth > found[hit.rule].worth):
                found[hit.rule] = hit
    return list(found.values())


def score(found: list[Hit]) -> int:
    """What the hits are worth together."""
    best: dict[str, int] = {}
    for hit in found:
        best[hit.rule] = max(best.get(hit.rule, 0), hit.worth)
    return sum(best.values())


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """(where it starts, piece) of a long text."""
    if len(text) <= PIECE:
        yield 0, text
        return
    for start in range(0, len(text) - OVERLAP, PIECE - OVERLAP):
        yield start, text[start : start + PIECE]


def _in_view(view: View, text: str, data: bool) -> Iterator[Hit]:
    candidates = {}
    for trace, rules in _TRACES[data].items():
        if trace in view.text:
            for rule in rules:
                candidates[id(rule)] = rule
    for rule in candidates.values():
        match = rule.pattern.search(view.text)
        if match is None:
            continue
        worth = rule.worth
        if view.how in _SEALED:
            worth += 1
        elif not data and _quoted(view.text, match.start(), match.end()):
            worth -= 1
        if worth:
            yield Hit(rule.id, worth, *_place(view, text, match.start(), match.end()), view.how)


def _quoted(text: str, start: int, end: int) -> bool:
    before, after = text[max(0, start - _AROUND) : start], text[end : end + _AROUND]
    return any(before.count(mark) % 2 and mark in after for mark in _QUOTES)


def _place(view: View, text: str, start: int, end: int) -> tuple[int, int]:
    """Where in the original: exact for the plain copy, else where the hidden segment begins."""
    if view.how:
        return view.start, min(len(text), view.start + 1)
    return origin(text, start), origin(text, max(start, end - 1)) + 1
