"""mojibake: UTF-8 that was once read as something else ("don't" with three odd characters).

In: a text. Out: why it cannot be trusted, or None. ftfy's ``badness`` counts sequences that no
language writes and that a wrong decoding leaves behind.
"""

from __future__ import annotations

#: A page about encodings shows a broken word or two. A page of English that was decoded wrongly
#: has one for each curly quote or dash: planted into prose, the median is 3 per 1,000 characters.
PER_1000 = 0.5
AT_LEAST = 2
#: Curly quotes and dashes begin so where UTF-8 was read as a DOS code page, which ftfy leaves out.
CP437 = "\u0393\u00c7"


def mojibake(text: str) -> str | None:
    """A reason such as "mojibake: 12 broken sequences", or None."""
    if text.isascii():
        return None
    from ftfy.badness import badness

    count = badness(text) + text.count(CP437)
    if count < AT_LEAST or count * 1000 < PER_1000 * len(text):
        return None
    return f"mojibake: {count} broken sequences, the text was decoded wrongly"
