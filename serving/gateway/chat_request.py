"""What a client may ask of a release: a strict reading of a chat request's JSON object.

In: the object. Out: a ChatRequest, or an ApiError that names the field. The last user message is
the question; system prompts and templates of clients are not used, because the release has its own.
Sampling is an allow-list. What would change the meaning of an answer and is not supported (tools,
n > 1, JSON output) is refused; everything else is dropped and never reaches the engine, engine
internals such as ``priority`` or ``cache_salt`` among it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.gateway import fields
from serving.gateway.envelope import ApiError
from serving.gateway.fields import Check

MAX_MESSAGES = 512
MAX_QUESTION = 20_000  # characters; the engine refuses what its context cannot hold
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(slots=True)
class ChatRequest:
    model: str
    question: str  # a guard that redacts puts its own text here
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # goes to the engine as it is


def parse(body: dict[str, Any]) -> ChatRequest:
    """Read the body. Raises ApiError invalid_request or unsupported_parameter."""
    for name, problem in _REFUSED.items():
        if body.get(name) is not None and problem(body[name]):
            raise ApiError("unsupported_parameter", f"'{name}' is not supported here.", name)
    options = _typed(body, "stream_options", dict, {})
    return ChatRequest(
        model=model_name(body),
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


def _typed(body: dict[str, Any], name: str, kind: type[Any], default: Any, prefix: str = "") -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ApiError(
            "invalid_request", f"'{prefix}{name}' must be of type {kind.__name__}.", prefix + name
        )
    return value


def model_name(body: dict[str, Any]) -> str:
    """The model that the client names."""
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
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError("invalid_request", f"'{at}' must have a known role.", f"{at}.role")
        if role == "user":
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
    return content


def _max_tokens(body: dict[str, Any]) -> int | None:
    """``max_completion_tokens`` is OpenAI's newer name and wins."""
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return int(fields.integer(1, 1 << 31)(name, body[name]))
    return None


#: The allow-list. Temperature 0 is the default: the same question gets the same answer.
_SAMPLING: dict[str, Check] = {
    "temperature": fields.number(0, 2),
    "top_p": fields.number(0, 1, open_low=True),
    "presence_penalty": fields.number(-2, 2),
    "frequency_penalty": fields.number(-2, 2),
    "seed": fields.integer(-(1 << 63), (1 << 63) - 1),
    "stop": fields.stop,
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
