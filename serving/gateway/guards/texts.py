"""Where in a request people's and tools' words stand, so that they can be read and replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from serving.gateway.api_request import ApiRequest


class Slot(NamedTuple):
    """``box[key]`` is a text; ``role`` is that of its message."""

    where: str
    role: str
    box: Any
    key: Any

    @property
    def text(self) -> str:
        value: str = self.box[self.key]
        return value


def slots(request: ApiRequest) -> list[Slot]:
    """Every text of a request: contents and their text parts, arguments of tool calls; prompts;
    inputs. Images, and the descriptions of tools, are not read."""
    body = request.body
    if request.kind == "embeddings":
        return list(_strings(body, "input", "input"))
    if request.kind == "completions":
        return [*_strings(body, "prompt", "prompt"), *_strings(body, "suffix", "suffix")]
    found: list[Slot] = []
    for number, message in enumerate(body["messages"]):
        role, content = message.get("role", ""), message.get("content")
        if isinstance(content, str):
            found.append(Slot(f"messages.{number}.content", role, message, "content"))
        elif isinstance(content, list):
            for place, part in enumerate(content):
                for key in ("text", "refusal"):
                    if isinstance(part, dict) and isinstance(part.get(key), str):
                        where = f"messages.{number}.content.{place}.{key}"
                        found.append(Slot(where, role, part, key))
        if message.get("tool_calls"):
            found += _arguments(message["tool_calls"], f"messages.{number}.tool_calls", role)
    return found


def has_tokens(request: ApiRequest) -> bool:
    """Whether a prompt comes as token ids, which no guard can read."""
    if request.kind == "chat":
        return False
    value = request.body.get("input" if request.kind == "embeddings" else "prompt")
    return isinstance(value, list) and any(not isinstance(item, str) for item in value)


def system_prompts(request: ApiRequest) -> list[str]:
    """What the client's system messages say."""
    if request.kind != "chat":
        return []
    return [slot.text for slot in slots(request) if slot.role in ("system", "developer")]


def _strings(body: dict[str, Any], key: str, where: str) -> Iterator[Slot]:
    value = body.get(key)
    if isinstance(value, str):
        yield Slot(where, "user", body, key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, str):
                yield Slot(f"{where}.{place}", "user", value, place)


def _arguments(calls: Any, where: str, role: str) -> Iterator[Slot]:
    for place, call in enumerate(calls if isinstance(calls, list) else []):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield Slot(f"{where}.{place}.arguments", role, function, "arguments")
