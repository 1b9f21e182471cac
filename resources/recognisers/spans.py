"""Spans of a text, by kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """``text[start:end]`` is of this kind."""

    kind: str
    start: int
    end: int


def without_overlap(spans: list[Found]) -> list[Found]:
    """Spans in order; one that begins inside an earlier one goes."""
    kept: list[Found] = []
    for span in sorted(spans, key=lambda item: (item.start, -item.end, item.kind)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept
