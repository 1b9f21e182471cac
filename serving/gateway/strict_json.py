"""JSON as strictly as a door needs it: what two readers could read differently is refused.

Duplicate keys are the reason for not using a faster parser: Python keeps the last, others the
first, so a guard and an engine could see two different messages. NaN and Infinity are no JSON, half
a surrogate pair is no text, and NUL ends strings in other languages. Depth and the number of
objects are bounded before anything walks through the result.
"""

from __future__ import annotations

import json
import re
from typing import Any

from serving.gateway.envelope import ApiError

MAX_DEPTH = 32
#: Objects and lists, other values, and marks of strings in one body. Building one takes 50 to 500
#: ns, and the loop waits: 25 ms at most. A body of source code has one brace in about 60 bytes.
MAX_CONTAINERS, MAX_VALUES, MAX_QUOTES = 30_000, 200_000, 100_000
#: Escapes that may stand for half a character or NUL; anything else needs no look at the strings.
_SUSPECT = re.compile(rb"\\u(?:d[89a-f]|0000)", re.IGNORECASE)
#: One string, or what has no end; possessive, so that it is one pass whatever stands there.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises ApiError invalid_json, or invalid_request for text that
    is no text."""
    brackets = raw.count(b"{") + raw.count(b"[")
    if brackets > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES or raw.count(b'"') > MAX_QUOTES:
        _check_counts(raw)
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError("invalid_json", f"The body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_json", "The body must be a JSON object.")
    if brackets > MAX_DEPTH and _too_deep(value):
        raise ApiError("invalid_json", f"The body is nested deeper than {MAX_DEPTH}.")
    if _SUSPECT.search(raw):
        _check_text(value, "")
    return value


def _check_counts(raw: bytes) -> None:
    """Raises ApiError invalid_json for more values than anybody needs; text does not count."""
    few = raw.count(b'"') - raw.count(b'\\"') <= MAX_QUOTES  # else counting takes too long
    bare = _STRING.sub(b"", raw) if few else b""
    containers = bare.count(b"{") + bare.count(b"[")
    if not few or containers > MAX_CONTAINERS or bare.count(b",") > MAX_VALUES:
        raise ApiError("invalid_json", "The body has too many objects, lists or values.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:64]!r} stands twice in one object")
            seen.add(name)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _too_deep(value: Any) -> bool:
    """Whether containers stand in each other more than MAX_DEPTH times; level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _check_text(value: Any, where: str) -> None:
    """Raises ApiError for a string, keys included, with half a character or NUL in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_string(key, where, "")
            if isinstance(item, str):
                _check_string(item, where, f".{key}" if where else key)
            elif isinstance(item, dict | list):
                _check_text(item, f"{where}.{key}" if where else key)
    else:
        for number, item in enumerate(value):
            if isinstance(item, str):
                _check_string(item, where, number)
            elif isinstance(item, dict | list):
                _check_text(item, f"{where}[{number}]")


def _check_string(text: str, where: str, at: str | int) -> None:
    """``where`` and ``at`` are put together only for an error: there may be 50,000 strings."""
    wrong = "a NUL character" if "\0" in text else ""
    if not wrong and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            wrong = "half a character"
    if wrong:
        name = where + (at if isinstance(at, str) else f"[{at}]") or "the body"
        raise ApiError("invalid_request", f"'{name}' holds {wrong}.", name)
