"""Checks of single fields of a request. Each takes (name, value) and gives the value, or raises
ApiError invalid_request with the field's name; a bool is never a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from serving.gateway.envelope import ApiError

Check = Callable[[str, Any], Any]
#: What each check accepts, as JSON Schema: the OpenAPI document is made of it.
SCHEMAS: dict[Check, dict[str, Any]] = {}


def described(check: Check, **schema: Any) -> Check:
    """The check, remembered with its schema."""
    SCHEMAS[check] = schema
    return check


def wrong(name: str, must: str) -> ApiError:
    return ApiError("invalid_request", f"'{name}' must be {must}.", name)


def number(low: float, high: float, *, open_low: bool = False) -> Check:
    least = "above" if open_low else "from"
    must = f"a number {least} {low:g} to {high:g}"

    def check(name: str, value: Any) -> Any:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            raise wrong(name, must)
        return float(value)

    least_is = {"exclusiveMinimum" if open_low else "minimum": low}
    return described(check, type="number", maximum=high, **least_is)


def integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise wrong(name, f"a whole number from {low} to {high}")
        return value

    return described(check, type="integer", minimum=low, maximum=high)


def boolean(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise wrong(name, "true or false")
    return value


def text(limit: int) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or len(value) > limit:
            raise wrong(name, f"a text of at most {limit} characters")
        return value

    return described(check, type="string", maxLength=limit)


def one_of(*values: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise wrong(name, "one of " + ", ".join(values))
        return value

    return described(check, type="string", enum=list(values))


def mapping(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise wrong(name, "an object")
    return value


def stop(name: str, value: Any) -> Any:
    words = [value] if isinstance(value, str) else value
    if (
        not isinstance(words, list)
        or len(words) > 4
        or not all(isinstance(word, str) and 0 < len(word) <= 64 for word in words)
    ):
        raise wrong(name, "up to 4 texts of 1 to 64 characters")
    return words


_WORD = {"type": "string", "minLength": 1, "maxLength": 64}
described(boolean, type="boolean")
described(mapping, type="object")
described(stop, anyOf=[_WORD, {"type": "array", "maxItems": 4, "items": _WORD}])
