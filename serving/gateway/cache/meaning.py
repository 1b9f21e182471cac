"""What may not differ between two questions that are given the same answer.

Vectors see what a sentence is about and are nearly blind to a digit, a "not" or a product code. So
these are compared as they stand: numbers in their order, how often something is negated, quoted
strings, identifiers and code words, and words outside ASCII (the model's vocabulary maps most of
them to one token for the unknown).
"""

from __future__ import annotations

import re

_NUMBERS = re.compile(r"\d+(?:[.,:/-]\d+)*\s*%?|[$€£¥₹]")
_WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
    "dozen": "12", "twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "hundred": "100",
    "thousand": "1000", "million": "1000000", "half": "1/2", "once": "1x", "twice": "2x",
    "double": "2x", "triple": "3x", "first": "1.", "second": "2.", "third": "3.",
}  # fmt: skip
_NUMBER_WORD = re.compile(r"\b(?:" + "|".join(_WORDS) + r")\b", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:no|not|never|none|nobody|nothing|nor|neither|without|cannot|unable|except|but not|"
    r"(?:do|does|did|is|are|was|were|has|have|had|ca|wo|would|could|should|must)n['\u2019]?t)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"`[^`]+`|\"[^\"]+\"|\u201c[^\u201d]+\u201d|(?<!\w)'[^']+'(?!\w)|\u2018[^\u2019]+\u2019(?!\w)"
)
#: With a digit, an underscore, a capital after the first letter, or dots, slashes, colons inside.
_IDENTIFIER = re.compile(r"(?<!\w)(?:[@#/.\\~-]*\w+(?:[._/\\:@#+-]+\w+)*(?:\(\))?)(?!\w)", re.ASCII)
_CODE = re.compile(
    r"[A-Za-z_]\W?\d|\d[A-Za-z_]|_|[a-z][A-Z]|[A-Z]{2}|\w[./\\:@#+]\w|^[@#/.\\~]|^--?\w|\(\)$",
    re.ASCII,
)
_FOREIGN = re.compile(r"\w*[^\x00-\x7f\u2018\u2019\u201c\u201d]\w*")


def fingerprint(text: str) -> tuple[tuple[str, ...], ...]:
    """Numbers, negations, quoted strings, identifiers and foreign words of a question."""
    numbers = [
        (match.start(), _WORDS.get(match[0].lower(), re.sub(r"\s", "", match[0])))
        for pattern in (_NUMBERS, _NUMBER_WORD)
        for match in pattern.finditer(text)
    ]
    return (
        tuple(value for _, value in sorted(numbers)),
        ("not",) * len(_NEGATION.findall(text)),
        tuple(found[1:-1] for found in _QUOTED.findall(text)),
        tuple(word for word in _IDENTIFIER.findall(text) if _CODE.search(word)),
        tuple(_FOREIGN.findall(text)),
    )
