"""Texts as logs may keep them: personal data and secrets are X, everything else stands.

The same recognisers as in the guards, whatever a key's guard policy says. For threads that write
logs; never for the event loop.
"""

from __future__ import annotations

import time

from resources.recognisers.redact import redact
from serving.gateway.guards.patterns import find
from serving.gateway.guards.work import SLICE, long_spans


def masked(text: str) -> str:
    """The text with every finding as X; its length does not change.

    Long texts are read in slices of a millisecond with a pause after each: a regular expression
    holds the interpreter's lock, so the event loop would wait for the whole text otherwise.
    """
    if len(text) <= SLICE:
        spans = find(text) if text else []
        return redact(text, spans) if spans else text
    work = long_spans(text)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return redact(text, end.value)
        time.sleep(0)
