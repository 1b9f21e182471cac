"""W3C trace context: in from a client, out to an upstream. Anything malformed is as if not sent.

Level 1 of the recommendation (https://www.w3.org/TR/trace-context-1/): ``traceparent`` decides; two
of them are none; a ``tracestate`` that breaks a rule is dropped whole and never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
#: Printable ASCII without "," and "="; no space at the end.
_SIGN = r"\x21-\x2b\x2d-\x3c\x3e-\x7e"
_MEMBER = re.compile(rf"({_KEY})=([ {_SIGN}]{{0,255}}[{_SIGN}])")
MAX_STATE, MAX_MEMBERS = 512, 32


class Parent(NamedTuple):
    """Who called us."""

    trace_id: int
    span_id: int
    sampled: bool
    state: str


def parent(headers: Iterable[tuple[bytes, bytes]]) -> Parent | None:
    """The caller's context out of ASGI headers (names in lower case); None without a valid one."""
    found: bytes | None = None
    states: list[bytes] = []
    for name, value in headers:
        if name == b"traceparent":
            if found is not None:
                return None
            found = value
        elif name == b"tracestate":
            states.append(value)
    if found is None:
        return None
    match = _PARENT.fullmatch(found.strip())
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    state = _state(b",".join(states)) if states else ""
    return Parent(trace_id, span_id, bool(int(flags, 16) & 1), state)


def _state(raw: bytes) -> str:
    """A valid tracestate, or ""."""
    if len(raw) > MAX_STATE:
        return ""
    members = [part.strip(" \t") for part in raw.decode("latin-1").split(",")]
    members = [part for part in members if part]
    keys = set()
    for member in members:
        match = _MEMBER.fullmatch(member)
        if match is None or match.group(1) in keys:
            return ""
        keys.add(match.group(1))
    return ",".join(members) if len(members) <= MAX_MEMBERS else ""


def outgoing(trace_id: int, span_id: int, sampled: bool, state: str) -> dict[str, str]:
    """Headers for an upstream."""
    headers = {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{'01' if sampled else '00'}"}
    if state:
        headers["tracestate"] = state
    return headers
