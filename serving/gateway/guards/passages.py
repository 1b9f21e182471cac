"""Retrieved text is data: what speaks to the model in it is taken out before it is put in a prompt.

A passage without a finding is unchanged, byte for byte, so that answers stay those which the gate
judged. Where instructions are found, the sentences that hold them go; a passage whose instructions
are hidden (encoded, in tags nobody sees, in markup) or come back after eight rounds goes whole.
"""

from __future__ import annotations

import re

from serving.gateway.guards.injection import Hit, hits, pieces, score

REMOVED = "[removed]"
_ROUNDS = 8
_SENTENCE_END = re.compile(r"[.!?\n](?=\s|$)")


def all_hits(text: str) -> list[Hit]:
    """The hits of a passage of any length, each rule once."""
    found: dict[str, Hit] = {}
    for start, piece in pieces(text):
        for hit in hits(piece, data=True):
            found.setdefault(hit.rule, hit._replace(start=hit.start + start, end=hit.end + start))
    return list(found.values())


def neutralised(text: str, threshold: int) -> str | None:
    """The passage without its instructions; None when it has to go whole."""
    for _ in range(_ROUNDS):
        found = all_hits(text)
        if score(found) < threshold:
            return text
        if any(hit.how for hit in found):
            return None
        kept, done = [], 0
        for start, end in sorted(_sentence(text, hit.start, hit.end) for hit in found):
            if end > done:
                kept += [text[done:start], REMOVED] if start >= done else []
                done = end
        text = "".join([*kept, text[done:]])
    return None


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence or line around a place, without the space before it."""
    before = [match.end() for match in _SENTENCE_END.finditer(text, 0, start)]
    begin = before[-1] if before else 0
    begin += len(text[begin:start]) - len(text[begin:start].lstrip())
    stop = _SENTENCE_END.search(text, max(begin, end - 1))
    return begin, stop.end() if stop else len(text)
