"""Guards over OpenAI's answers: chunks of a stream, and whole bodies.

Every text of an answer is guarded for itself: the content of each choice, its reasoning, a
refusal, the arguments of each tool call. Where a guard may change texts, ``logprobs`` go: they
spell out what is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from serving.gateway.api_request import ApiRequest
from serving.gateway.guards.run import Guards
from serving.gateway.guards.stream import StreamGuard
from serving.gateway.guards.verdict import Verdict

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
Chunk = dict[str, Any]
#: (choice, "content" …) or (choice, "arguments", which call).
Channel = tuple[int, str, int]


class ChunkGuard:
    """The guards of one streamed response.

        guarded = ChunkGuard(lambda: guards.stream(policy, request))
        for out in guarded.through(chunk): ...encode and send out...

    Chunks come changed in place, or not at all while their text is held back. What is held leaves
    with the chunk that has the finish reason; a stream that ends without one is an error, and its
    held text stays in. Raises ApiError (output_blocked): the stream ends with its frame.
    """

    def __init__(self, make: Callable[[], StreamGuard | None]) -> None:
        self._make = make
        self._guards: dict[Channel, StreamGuard] = {}

    def through(self, chunk: Chunk) -> Iterator[Chunk]:
        """The chunk as it may go out, if there is anything left to say in it."""
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            yield chunk
            return
        left = [self._choice(choice) for choice in choices]
        if any(left):
            yield chunk

    def verdicts(self) -> list[Verdict]:
        """One for each text that came."""
        return [guard.verdict for guard in self._guards.values()]

    def guard(self, choice: int = 0) -> StreamGuard | None:
        """That of a choice's content, for ``Guards.after_stream``."""
        return self._guards.get((choice, "content", 0))

    def _choice(self, choice: Chunk) -> bool:
        """Guard one choice; False when nothing is left of it."""
        index = choice.get("index") or 0
        says = False
        delta = choice.get("delta")
        if isinstance(delta, dict):
            for name in _TEXTS:
                if isinstance(delta.get(name), str):
                    delta[name] = self._fed((index, name, 0), delta[name])
            for place, call in enumerate(delta.get("tool_calls") or ()):
                self._call(index, place, call)
            says = any(value for value in delta.values())
        if isinstance(choice.get("text"), str):  # /v1/completions
            choice["text"] = self._fed((index, "text", 0), choice["text"])
            says = says or bool(choice["text"])
        if any(guard.changes for guard in self._guards.values()):
            choice.pop("logprobs", None)
        if choice.get("finish_reason") is not None:
            self._finish(index, choice)
            says = True
        return says

    def _call(self, index: int, place: int, call: Chunk) -> None:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            channel = (index, "arguments", call.get("index", place))
            function["arguments"] = self._fed(channel, function["arguments"])

    def _fed(self, channel: Channel, text: str) -> str:
        guard = self._guards.get(channel)
        if guard is None:
            made = self._make()
            if made is None:
                return text
            guard = self._guards[channel] = made
        return guard.feed(text)

    def _finish(self, index: int, choice: Chunk) -> None:
        """Let out what was held back of this choice."""
        for (of, name, which), guard in self._guards.items():
            rest = guard.close() if of == index else ""
            if not rest:
                continue
            if name == "text":
                choice["text"] = (choice.get("text") or "") + rest
                continue
            delta = choice.setdefault("delta", {})
            if name == "arguments":
                calls = delta.setdefault("tool_calls", [])
                same = [call for call in calls if call.get("index") == which]
                if same:
                    same[0]["function"]["arguments"] += rest
                else:
                    calls.append({"index": which, "function": {"arguments": rest}})
            else:
                delta[name] = (delta.get(name) or "") + rest


async def guard_body(
    guards: Guards,
    policy: str,
    body: Chunk,
    request: ApiRequest,
    prompts: Sequence[str] | None = None,
    response_id: str = "",
) -> list[Verdict]:
    """Guard a whole response in place; a verdict for each text. Raises ApiError when one of them
    may not go out."""
    verdicts = []
    for choice in body.get("choices") or ():
        changed = False
        for box, key, promised in _whole_texts(choice):
            verdict = await guards.check_output(
                policy, box[key], request, prompts, response_id, promised=promised
            )
            verdicts.append(verdict)
            if verdict.error:
                raise verdict.error
            changed = changed or verdict.text != box[key]
            box[key] = verdict.text
        if changed:
            choice.pop("logprobs", None)
    return verdicts


def _whole_texts(choice: Chunk) -> Iterator[tuple[Chunk, str, bool]]:
    """(where, key, whether response_format is about it) of a choice's texts."""
    if isinstance(choice.get("text"), str):
        yield choice, "text", False
    message = choice.get("message")
    if not isinstance(message, dict):
        return
    for name in _TEXTS:
        if isinstance(message.get(name), str):
            yield message, name, name == "content"
    for call in message.get("tool_calls") or ():
        if isinstance(call.get("function"), dict) and isinstance(
            call["function"].get("arguments"), str
        ):
            yield call["function"], "arguments", False
