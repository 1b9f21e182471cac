"""redact: masking spans of a text without moving anything else.

In: a text, spans. Out: a text of the same length, in which letters and digits of the spans read X
and everything else stands as it stood. So offsets of headings and chunks stay true; the text is no
longer byte-exact, while ``md5`` remains that of the source's bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from resources.recognisers.spans import Found

_SIGN = re.compile(r"[^\W_]")


def mask(value: str) -> str:
    """``value`` with every letter and digit as X: it tells the kind's shape and nothing else."""
    return _SIGN.sub("X", value)


def redact(text: str, spans: Iterable[Found]) -> str:
    """The text with the spans masked; its length does not change."""
    parts, done = [], 0
    for span in sorted(spans, key=lambda item: item.start):
        start = max(span.start, done)
        parts += [text[done:start], mask(text[start : span.end])]
        done = max(done, span.end)
    return "".join([*parts, text[done:]])
