"""secrets: private keys and the API keys of well-known services.

In: a text. Out: spans by kind. A private key needs its body, not only its first line; an API key
needs its service's shape and a random look: documentation is full of ``sk-...your-key-here`` and
of AWS's own AKIAIOSFODNN7EXAMPLE.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from stages.defects.pii import Found

PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<what>(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?P<body>[^-]{64,20000})-----END (?P=what)-----"
)
#: (what every such key holds, its shape; group 1 is the random part)
SHAPES = (
    (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)([A-Z2-7]{16})\b"),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_([A-Za-z0-9]{36})\b"),
    (("github_pat_",), r"\bgithub_pat_([A-Za-z0-9]{22}_[A-Za-z0-9]{59})\b"),
    (("glpat-",), r"\bglpat-([A-Za-z0-9_-]{20})(?![\w-])"),
    (("xox",), r"\bxox[abprs]-([A-Za-z0-9-]{20,200})(?![\w-])"),
    (("k_live_",), r"\b[sr]k_live_([A-Za-z0-9]{24,99})\b"),
    (("AIza",), r"\bAIza([A-Za-z0-9_-]{35})(?![\w-])"),
    (("sk-",), r"(?<![\w-])sk-(?:(?:proj|svcacct|ant-api\d\d)-)?([A-Za-z0-9_-]{32,180})(?![\w-])"),
    (("hf_",), r"\bhf_([A-Za-z0-9]{34})\b"),
    (("npm_",), r"\bnpm_([A-Za-z0-9]{36})\b"),
    (("pypi-",), r"\bpypi-(AgE[A-Za-z0-9_-]{60,250})(?![\w-])"),
    (("SG.",), r"\bSG\.([A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})(?![\w-])"),
)
_SHAPES = tuple((marks, re.compile(shape)) for marks, shape in SHAPES)

PLACEHOLDER = re.compile(
    r"example|your|placeholder|dummy|fake|secret|token|xxxx|1234567|abcdefg", re.I
)

HEX = re.compile(r"[0-9a-f]{32,}")

#: Bits a character of the random part: 16 signs of 32 have 2.9 at the least of 100,000 draws, 20 of
#: 62 have 3.5, 32 hexadecimal ones 3.0; "A1A1A1…" has 1.
MIN_BITS_SHORT = 2.8
MIN_BITS = 3.4


def find_secrets(text: str) -> list[Found]:
    """Every private key and API key, in order of position."""
    spans = list(_private_keys(text)) if "PRIVATE KEY" in text else []
    for marks, shape in _SHAPES:
        if any(mark in text for mark in marks):
            for match in shape.finditer(text):
                if is_random(match.group(1)):
                    spans.append(Found("api_key", match.start(), match.end()))
    return sorted(spans, key=lambda span: (span.start, span.end))


def _private_keys(text: str) -> Iterator[Found]:
    for match in PRIVATE_KEY.finditer(text):
        body = re.sub(r"\\[nr]|\s|[\"'+,>|]", "", match["body"])
        if is_random(body[-400:]):
            yield Found("private_key", match.start(), match.end())


def is_random(body: str) -> bool:
    """Whether it looks drawn by a generator: entropy, mixed signs, no word of an example.

    Names joined by hyphens reach the entropy of keys, but are in one case.
    """
    if PLACEHOLDER.search(body):
        return False
    if len(body) < 20 or HEX.fullmatch(body):
        return any(map(str.isdigit, body)) and entropy(body) >= MIN_BITS_SHORT
    mixed = any(map(str.isupper, body)) and any(map(str.islower, body))
    return mixed and entropy(body) >= MIN_BITS


def entropy(text: str) -> float:
    """Shannon entropy in bits a character."""
    length = len(text)
    counts = Counter(text).values()
    return -sum(count / length * math.log2(count / length) for count in counts)
