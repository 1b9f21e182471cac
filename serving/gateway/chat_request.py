"""What a client may ask: a strict reading of the body of ``POST /v1/chat/completions``.

In: bytes. Out: a ChatRequest, or an ApiError that names the field. The last user message is the
question; system prompts and templates of clients are not used, because the release has its own.
Sampling is an allow-list. What would change the meaning of an answer and is not supported (tools,
n > 1, JSON output) is refused; everything else is dropped and never reaches the engine, engine
internals such as ``priority`` or ``cache_salt`` among it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.gateway.envelope import ApiError

MAX_MESSAGES = 512
MAX_QUESTION = 20_000  # characters; the engine refuses what its context cannot hold
MAX_DEPTH = 32
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True)
class ChatRequest:
    model: str
    question: str
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # goes to the engine as it is


def parse(raw: bytes) -> ChatRequest:
    """Read the body. Raises ApiError invalid_json, invalid_request or unsupported_parameter."""
    body = _object(raw)
    for name, problem in _REFUSED.items():
        if body.get(name) is not None and problem(body[name]):
            raise ApiError("unsupported_parameter", f"'{name}' is not supported here.", name)
    options = _typed(body, "stream_options", dict, {})
    return ChatRequest(
        model=_model(body),
        question=_question(body.get("messages")),
        stream=_typed(body, "stream", bool, False),
        include_usage=_typed(options, "include_usage", bool, False, "stream_options."),
        max_tokens=_max_tokens(body),
        sampling={
            name: check(name, body[name])
            for name, check in _SAMPLING.items()
            if body.get(name) is not None
        },
    )


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object. Duplicate keys are refused: two readers could see different values."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError("invalid_json", f"The body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_json", "The body must be a JSON object.")
    if _deeper(value, MAX_DEPTH):
        raise ApiError("invalid_json", f"The body is nested deeper than {MAX_DEPTH}.")
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


def _deeper(value: Any, left: int) -> bool:
    if left == 0:
        return isinstance(value, dict | list)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_deeper(item, left - 1) for item in items)


def _typed(body: dict[str, Any], name: str, kind: type[Any], default: Any, prefix: str = "") -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ApiError(
            "invalid_request", f"'{prefix}{name}' must be of type {kind.__name__}.", prefix + name
        )
    return value


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError("invalid_request", "'model' must be the name of a model.", "model")
    return model


def _question(messages: Any) -> str:
    """Text of the last user message; every message must have the form of one."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("invalid_request", "'messages' must be a list with a message.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise ApiError("invalid_request", f"More than {MAX_MESSAGES} messages.", "messages")
    question: str | None = None
    where = "messages"
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ApiError("invalid_request", f"'{at}' must have a known role.", f"{at}.role")
        if message["role"] == "user":
            question, where = _text(message.get("content"), f"{at}.content"), f"{at}.content"
    if question is None or not question.strip():
        raise ApiError("invalid_request", "There is no user message with text.", where)
    if len(question) > MAX_QUESTION:
        raise ApiError(
            "context_length_exceeded",
            f"The question has {len(question)} characters; at most {MAX_QUESTION} are read.",
            where,
        )
    return question


def _text(content: Any, where: str) -> str:
    """Content as text: a string, or a list of text parts."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError("unsupported_parameter", f"'{where}' may hold text parts only.", where)
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise ApiError("invalid_request", f"'{where}' must be text.", where)
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError("invalid_request", f"'{where}' holds half a character.", where) from None
    if "\0" in content:
        raise ApiError("invalid_request", f"'{where}' holds a NUL character.", where)
    return content


def _max_tokens(body: dict[str, Any]) -> int | None:
    """``max_completion_tokens`` is OpenAI's newer name and wins."""
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return int(_integer(1, 1 << 31)(name, body[name]))
    return None


Check = Callable[[str, Any], Any]


def _number(low: float, high: float, *, open_low: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not good
            or not math.isfinite(value)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            least = "above" if open_low else "from"
            raise ApiError(
                "invalid_request", f"'{name}' must be a number {least} {low:g} to {high:g}.", name
            )
        return float(value)

    return check


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ApiError(
                "invalid_request", f"'{name}' must be a whole number from {low} to {high}.", name
            )
        return value

    return check


def _stop(name: str, value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if (
        not isinstance(words, list)
        or len(words) > 4
        or not all(isinstance(word, str) and 0 < len(word) <= 64 for word in words)
    ):
        raise ApiError("invalid_request", f"'{name}' must be up to 4 texts of 1 to 64.", name)
    return words


#: The allow-list. Temperature 0 is the default: the same question gets the same answer.
_SAMPLING: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, open_low=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _integer(-(1 << 63), (1 << 63) - 1),
    "stop": _stop,
}
#: Parameters that would change what an answer is, and when they would.
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value != 1 or isinstance(value, bool),
    "tools": lambda value: value != [],
    "tool_choice": lambda value: value not in ("none", "auto"),
    "functions": lambda value: value != [],
    "function_call": lambda value: value not in ("none", "auto"),
    "response_format": lambda value: value != {"type": "text"},
    "modalities": lambda value: value != ["text"],
    "audio": lambda value: True,
    "prediction": lambda value: True,
    "logprobs": lambda value: value is not False,
    "top_logprobs": lambda value: True,
    "logit_bias": lambda value: value != {},
    "web_search_options": lambda value: True,
}
