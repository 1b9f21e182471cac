"""A request as the parts of the gateway see it: validated, and parsed exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "completions", "embeddings"]
#: Where each kind lives, on our side and upstream.
PATHS: dict[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}


@dataclass(slots=True)
class ApiRequest:
    """What a client asks.

    ``body`` may go upstream once ``model`` in it is replaced: it is validated, and fields that are
    the engine's own business (``priority``, ``cache_salt``, …) are gone. Guards that redact put
    changed texts into it.
    """

    kind: Kind
    model: str  # the logical model's name
    body: dict[str, Any]
    stream: bool = False
    include_usage: bool = False  # the client asked for the usage event of a stream
    n: int = 1  # answers per prompt
    prompts: int = 1  # prompts in one request (completions, embeddings)
    max_tokens: int | None = None  # of one answer
    session: str = ""  # x-session-id, else the body's `user`: affinity, stickiness, session budget
    feature: str = ""  # x-ratchet-feature: what costs are attributed to

    def texts(self) -> list[str]:
        """Every text that people or tools wrote into it, in order."""
        if self.kind == "embeddings":
            return _strings(self.body.get("input"))
        if self.kind == "completions":
            return _strings(self.body.get("prompt"))
        found: list[str] = []
        for message in self.body["messages"]:
            content = message.get("content")
            if isinstance(content, str):
                found.append(content)
            elif isinstance(content, list):
                found += [part["text"] for part in content if part.get("type") == "text"]
        return found


def _strings(value: Any) -> list[str]:
    """A text or texts; token ids have none."""
    if isinstance(value, str):
        return [value]
    return [item for item in value or [] if isinstance(item, str)]
