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
#: Objects in one body. Building one takes half a microsecond, and the loop waits: 15 ms at most.
#: A body of source code has one opening brace in about 60 bytes.
MAX_OBJECTS = 30_000
#: Escapes that may stand for half a character or NUL; anything else needs no look at the strings.
_SUSPECT = re.compile(rb"\\u(?:d[89a-f]|0000)", re.IGNORECASE)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises ApiError invalid_json, or invalid_request for text that
    is no text."""
    brackets = raw.count(b"{")
    if brackets > MAX_OBJECTS:
        raise ApiError("invalid_json", f"The body may have more than {MAX_OBJECTS} objects.")
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError("invalid_json", f"The body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_json", "The body must be a JSON object.")
    if brackets + raw.count(b"[") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise ApiError("invalid_json", f"The body is nested deeper than {MAX_DEPTH}.")
    if b"\0" in raw or _SUSPECT.search(raw):
        _check_text(value, "")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:64]!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _deeper(value: Any, left: int) -> bool:
    if left == 0:
        return isinstance(value, dict | list)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_deeper(item, left - 1) for item in items)


def _check_text(value: Any, where: str) -> None:
    """Raises ApiError for a string, keys included, with half a character or NUL in it."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError("invalid_request", f"'{where}' holds half a character.", where) from None
        if "\0" in value:
            raise ApiError("invalid_request", f"'{where}' holds a NUL character.", where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, where or "the body")
            _check_text(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_text(item, f"{where}[{number}]")
