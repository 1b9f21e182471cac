"""Whether a text is about somebody. Such answers stay in this process: Redis and Qdrant write what
they are given to disks, and others read there.

The recognisers are those of the guards, whatever a key's guard policy says. They read what people
read, so a value that the engine cut into several events is seen whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from serving.gateway.cache.answer import Answer
from serving.gateway.masking import masked
from serving.gateway.sse import Frames, MalformedStream

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text")


def personal(text: str) -> bool:
    """Whether it holds personal data or a secret. A millisecond for each 8 KiB; a long text belongs
    into a thread."""
    return masked(text) != text


def said(answer: Answer) -> str:
    """All that people read of an answer; the bytes as they are where it is of no known form."""
    if answer.text:
        return answer.text
    texts: dict[tuple[int, str], list[str]] = {}
    try:
        for event in _events(answer.body):
            for choice in event.get("choices") or ():
                box = choice.get("delta") or choice.get("message") or choice
                for name in _TEXTS:
                    if isinstance(box.get(name), str):
                        texts.setdefault((choice.get("index", 0), name), []).append(box[name])
    except (ValueError, AttributeError, TypeError, MalformedStream):
        return answer.body.decode("utf-8", "replace")
    return "\n".join("".join(parts) for parts in texts.values())


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    if body[:1] == b"{":
        yield json.loads(body)
        return
    frames = Frames()
    for cut in (frames.feed(body), frames.rest()):
        for frame in cut:
            if frame.data and not frame.done:
                yield frame.json()
