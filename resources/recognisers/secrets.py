"""secrets: private keys and the API keys of well-known services.

In: a text. Out: spans by kind. A private key needs its body, not only its first line (its end may
be cut off); an API key needs its service's shape and a random look: documentation is full of
``sk-...your-key-here`` and of AWS's own AKIAIOSFODNN7EXAMPLE.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from resources.recognisers.spans import Found

#: A key that was cut off has no end; it is one all the same, up to the next hyphen.
MIN_BODY, MAX_BODY = 64, 20_000
KEY_HEAD = re.compile(r"-----BEGIN (?P<what>(?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?)-----")
PRIVATE_KEY = re.compile(
    KEY_HEAD.pattern + rf"(?P<body>[^-]{{{MIN_BODY},{MAX_BODY}}})(?:-----END (?P=what)-----)?"
)
#: So much of a body is looked at, and it holds a whole line of base64.
BODY = 400
LINE = re.compile(r"[A-Za-z0-9+/]{40}")
#: (what every such key holds, its shape; group 1 is the random part)
SHAPES = (
    (("rk_",), r"\brk_[0-9a-f]{12}\.([A-Za-z0-9_-]{43})(?![\w-])"),  # ours: resources/keys
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
_SHAPES = tuple((mark, re.compile(shape)) for marks, shape in SHAPES for mark in marks)

PLACEHOLDER = re.compile(
    r"example|your|placeholder|dummy|fake|secret|token|xxxx|1234567|abcdefg", re.I
)

HEX = re.compile(r"[0-9a-f]{32,}")

#: Bits a character of the random part: 16 signs of 32 have 2.9 at the least of 100,000 draws, 20 of
#: 62 have 3.5, 32 hexadecimal ones 3.0; "A1A1A1…" has 1.
MIN_BITS_SHORT = 2.8
MIN_BITS = 3.4


def find_secrets(text: str) -> list[Found]:
    """Every private key and API key, in order of position; no API key inside a private key."""
    keys = list(private_keys(text)) if "PRIVATE KEY" in text else []
    spans = [s for s in api_keys(text) if all(s.end <= k.start or s.start >= k.end for k in keys)]
    return sorted([*keys, *spans], key=lambda span: (span.start, span.end))


def api_keys(text: str, start: int = 0) -> list[Found]:
    """API keys from ``start`` on; what stands before it is looked back at and nothing more."""
    spans: set[Found] = set()
    for mark, shape in _SHAPES:
        if mark in text:
            for match in shape.finditer(text, start):
                if is_random(match.group(1)):
                    spans.add(Found("api_key", match.start(), match.end()))
    return sorted(spans, key=lambda span: (span.start, span.end))


def private_keys(text: str) -> Iterator[Found]:
    for match in PRIVATE_KEY.finditer(text):
        if is_key_body(match["body"]):
            yield Found("private_key", match.start(), match.end())


def is_key_body(body: str) -> bool:
    """Whether its first BODY characters look like a key's."""
    seen = body[:BODY]
    return bool(LINE.search(seen)) and is_random(re.sub(r"\\[nr]|\s|[\"'+,>|]", "", seen))


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
