"""What a client may ask of a plain model: chat, completions and embeddings as OpenAI defines them.

In: a request's JSON object. Out: an ApiRequest whose body is an allow-list: each field is checked,
and what is not on the list is dropped. So ``priority``, ``cache_salt``, ``prompt_embeds``,
``chat_template``, ``kv_transfer_params`` and what the next engine version invents never leave here.
Tools and response formats go through as they are.
"""

from __future__ import annotations

from typing import Any

from serving.gateway import fields
from serving.gateway.api_request import ApiRequest, Kind
from serving.gateway.envelope import ApiError
from serving.gateway.fields import Check, wrong

MAX_MESSAGES = 2048
MAX_PROMPTS = 2048  # OpenAI's bound for embeddings
MAX_TOOLS = 128
MAX_N = 16  # answers to one prompt: each is reserved and paid
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_SAMPLING: dict[str, Check] = {
    "temperature": fields.number(0, 2),
    "top_p": fields.number(0, 1, open_low=True),
    "presence_penalty": fields.number(-2, 2),
    "frequency_penalty": fields.number(-2, 2),
    "seed": fields.integer(-(1 << 63), (1 << 63) - 1),
    "stop": fields.stop,
    "n": fields.integer(1, MAX_N),
    "max_tokens": fields.integer(1, 1 << 31),
    "logit_bias": fields.mapping,
    "user": fields.text(512),
    "top_k": fields.integer(-1, 1 << 20),  # vLLM's
    "min_p": fields.number(0, 1),  # vLLM's
    "repetition_penalty": fields.number(0, 10, open_low=True),  # vLLM's
}


def _tools(name: str, value: Any) -> Any:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong(name, f"a list of at most {MAX_TOOLS} tools")
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("parameters", {}), dict)
        ):
            raise wrong(f"{name}[{number}]", "a function with a name and parameters")
    return value


def _tool_choice(name: str, value: Any) -> Any:
    if value in ("none", "auto", "required") or (isinstance(value, dict) and "function" in value):
        return value
    raise wrong(name, "none, auto, required or a function")


def _response_format(name: str, value: Any) -> Any:
    kinds = ("text", "json_object", "json_schema")
    if not isinstance(value, dict) or value.get("type") not in kinds:
        raise wrong(name, "an object whose type is " + ", ".join(kinds))
    schema = value.get("json_schema")
    if value["type"] == "json_schema" and not (
        isinstance(schema, dict) and isinstance(schema.get("schema"), dict)
    ):
        raise wrong(f"{name}.json_schema", "an object with a schema")
    return value


FIELDS: dict[Kind, dict[str, Check]] = {
    "chat": {
        **_SAMPLING,
        "max_completion_tokens": fields.integer(1, 1 << 31),
        "tools": _tools,
        "tool_choice": _tool_choice,
        "parallel_tool_calls": fields.boolean,
        "response_format": _response_format,
        "logprobs": fields.boolean,
        "top_logprobs": fields.integer(0, 20),
        "reasoning_effort": fields.one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    },
    "completions": {
        **_SAMPLING,
        "best_of": fields.integer(1, MAX_N),
        "echo": fields.boolean,
        "logprobs": fields.integer(0, 5),
        "suffix": fields.text(100_000),
    },
    "embeddings": {
        "dimensions": fields.integer(1, 1 << 16),
        "encoding_format": fields.one_of("float", "base64"),
        "user": fields.text(512),
    },
}


def parse(kind: Kind, model: str, given: dict[str, Any]) -> ApiRequest:
    """Read the object. Raises ApiError invalid_request or unsupported_parameter."""
    body: dict[str, Any] = {}
    checks = FIELDS[kind]
    for name, value in given.items():
        check = checks.get(name)
        if check is not None and value is not None:
            body[name] = check(name, value)
    request = ApiRequest(kind, model, body)
    if kind == "chat":
        body["messages"] = _messages(given.get("messages"))
    else:
        name = "prompt" if kind == "completions" else "input"
        body[name], request.prompts = _prompts(name, given.get(name))
    if kind != "embeddings":
        _stream(given, request)
        if "max_completion_tokens" in body:
            body.pop("max_tokens", None)  # of two limits an engine could follow the other one
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        request.n, request.max_tokens = body.get("n", 1), limit
    request.session = body.get("user", "")
    return request


def _stream(given: dict[str, Any], request: ApiRequest) -> None:
    stream = given.get("stream")
    if stream is not None:
        request.stream = fields.boolean("stream", stream)
    options = given.get("stream_options")
    if options is not None:
        usage = fields.mapping("stream_options", options).get("include_usage")
        if usage is not None:
            name = "stream_options.include_usage"
            request.include_usage = fields.boolean(name, usage) and request.stream


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list with a message")
    if len(value) > MAX_MESSAGES:
        raise wrong("messages", f"a list of at most {MAX_MESSAGES}")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def _message(at: str, message: Any) -> dict[str, Any]:
    """One message with the fields that its role may have."""
    if not isinstance(message, dict):
        raise wrong(at, "an object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{at}.role", "a known role")
    found: dict[str, Any] = {"role": role}
    if isinstance(content, str):
        found["content"] = content
    elif isinstance(content, list):
        found["content"] = [_part(f"{at}.content[{n}]", part) for n, part in enumerate(content)]
    elif content is None and role == "assistant":
        found["content"] = None
    else:
        raise wrong(f"{at}.content", "a text or a list of text parts")
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            found[name] = fields.text(256)(f"{at}.{name}", message[name])
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _calls(f"{at}.tool_calls", message["tool_calls"])
    return found


def _part(at: str, part: Any) -> dict[str, Any]:
    """Media parts name URLs that an engine would fetch from where it stands: not accepted."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise wrong(at, "an object with a type")
    if part["type"] != "text":
        raise ApiError("unsupported_parameter", f"'{at}' may be text only.", at)
    if not isinstance(part.get("text"), str):
        raise wrong(f"{at}.text", "a text")
    return {"type": "text", "text": part["text"]}


def _calls(at: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong(at, f"a list of at most {MAX_TOOLS} calls")
    found = []
    for number, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(call.get("id"), str)
            or call.get("type", "function") != "function"
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), str)
        ):
            raise wrong(f"{at}[{number}]", "a call with id, name and arguments")
        kept = {"name": function["name"], "arguments": function["arguments"]}
        found.append({"id": call["id"], "type": "function", "function": kept})
    return found


def _prompts(name: str, value: Any) -> tuple[Any, int]:
    """A text, texts, token ids or lists of them; and how many prompts that is."""
    if isinstance(value, str):
        return value, 1
    if isinstance(value, list) and value:
        if _ids(value):
            return value, 1
        if len(value) > MAX_PROMPTS:  # before anything walks through them
            raise wrong(name, f"at most {MAX_PROMPTS} prompts")
        if all(isinstance(item, str) for item in value) or all(map(_ids, value)):
            return value, len(value)
    raise wrong(name, "a text, texts, token ids or lists of token ids")


def _ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    )
