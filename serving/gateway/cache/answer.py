"""An answer as the cache keeps it, and which answers it never keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.gateway.cache.scope import Scope

#: Inside a JSON string a quote is written \", so these can only be keys.
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([^"]*)"')
_ERROR = re.compile(rb'"error"\s*:\s*(?!null|\s)')
_CALLS = re.compile(rb'"(?:tool_calls"\s*:\s*\[\s*\{|function_call"\s*:\s*\{)')
_DONE = re.compile(rb"data:[ \t]?\[DONE\]\s*\Z")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was sent, whole.

    Attributes:
        body: a JSON body, or all events of a stream, ``[DONE]`` included.
        response_id: the gateway's own id where it stands in ``body``; "" where it does not.
        text: what people read of it, for the request log and for comparing answers.
        meta: whatever else the handler needs to tell of it (JSON); opaque here.
        changed: a guard redacted or blocked part of it.
    """

    body: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0
    response_id: str = ""
    text: str = ""
    meta: bytes = b""
    changed: bool = False

    @property
    def size(self) -> int:
        """Bytes of memory, about: 800 are objects and the tables that hold them."""
        return len(self.body) + 2 * len(self.text) + len(self.meta) + 800

    def replay(self, response_id: str) -> bytes:
        """The body under a response id of its own. Ours has 96 random bits: it stands nowhere
        else in it."""
        if not self.response_id:
            return self.body
        return self.body.replace(self.response_id.encode(), response_id.encode())


def refusal(scope: Scope, answer: Answer, max_bytes: int) -> str:
    """Why an answer is not kept; "" when it may be.

    Reading a body costs 0.3 ms a MiB, so what is too large is not read.
    """
    body = answer.body
    if answer.changed:
        return "guard"
    if answer.size > max_bytes or not body:  # nothing was collected of what grew too large
        return "too_large"
    if _ERROR.search(body):
        return "error"
    if scope.stream:
        if not _DONE.search(body[-32:]):
            return "truncated"
    elif body[:1] != b"{" or body.rstrip()[-1:] != b"}":
        return "truncated"
    if scope.kind == "embeddings":
        return ""
    ends = _FINISH.findall(body)
    if b"tool_calls" in ends or b"function_call" in ends or _CALLS.search(body):
        return "tools"
    if len(ends) < scope.answers or set(ends) != {b"stop"}:
        return "truncated"
    return ""
