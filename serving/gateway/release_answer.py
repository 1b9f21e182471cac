"""An engine's chunks as the client of a release gets them: streamed on, or as one body.

Chunks are relayed as they came, under our id and name; the one with the finish reason also carries
``citations`` and ``release``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from contracts.records import REFUSAL, Citation, Passage
from resources import rag
from serving.gateway.cache.answer import Answer
from serving.gateway.chat_request import ChatRequest
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.chunks import ChunkGuard
from serving.gateway.sse import Frame, MalformedStream, Relabel, encode
from serving.gateway.upstream_errors import UpstreamError

DONE = b"data: [DONE]\n\n"


class Telling:
    """One answer on its way to its client.

    Args:
        asked: whether it is streamed, and with its usage.
        exchange: told the text.
        guard: of what may be changed or held back; such chunks are serialised anew.
    """

    def __init__(self, asked: ChatRequest, exchange: Exchange, guard: ChunkGuard | None) -> None:
        self._asked, self._exchange, self._guard = asked, exchange, guard
        self._relabel = Relabel(exchange.response_id, asked.model)
        self._finish: str | None = None

    def frames(self, frames: Iterable[Frame]) -> Iterator[bytes]:
        """Events for the client; none for one who wants one body. Raises ApiError."""
        try:
            for frame in frames:
                if frame.data and not frame.done:
                    yield from self.chunk(frame.json(), frame)
        except MalformedStream as error:
            raise UpstreamError("malformed", f"The engine's stream: {error}.") from None

    def chunk(self, chunk: dict[str, Any], frame: Frame | None = None) -> Iterator[bytes]:
        """The same of one chunk; ``frame`` is what it was read from."""
        if self._guard is None:
            yield from self._out(chunk, frame)
        else:
            for changed in self._guard.through(chunk):
                yield from self._out(changed, None)

    def _out(self, chunk: dict[str, Any], frame: Frame | None) -> Iterator[bytes]:
        relabel = self._relabel
        finish, changed = note(chunk, self._exchange)
        self._finish = finish or self._finish
        if not self._asked.stream:
            return
        if finish is not None:
            yield relabel.final(chunk, self._more())
        elif not chunk.get("choices") and not self._asked.include_usage:
            return  # the usage that only we asked for
        elif frame is None or changed:
            yield encode({**chunk, **relabel.names})
        else:
            yield relabel(frame, chunk)

    def end(self) -> None:
        """The engine is done. Raises ApiError when the answer has no end."""
        if self._finish is None:
            raise ApiError("engine_disconnected", "The engine's answer has no end.")

    def body(self) -> bytes:
        """The whole answer as one JSON object."""
        exchange = self._exchange
        prompt, completion = exchange.prompt_tokens or 0, exchange.completion_tokens or 0
        message = {"role": "assistant", "content": exchange.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish}
        value = {
            "id": exchange.response_id,
            "object": "chat.completion",
            "created": int(exchange.arrived.timestamp()),
            "model": self._asked.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
            **self._more(),
        }
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")

    def _more(self) -> dict[str, Any]:
        """What only answers of releases have."""
        found: list[Citation] = rag.cite(self._exchange.text, self._exchange.passages)
        citations = [citation.model_dump() for citation in found]
        return {"citations": citations, "release": self._exchange.release}


def kept(exchange: Exchange, body: bytes, changed: bool) -> Answer:
    """The answer for the cache: what the client was sent, and what the request log has of it."""
    passages = [[one.n, one.chunk_id, one.score] for one in exchange.passages]
    return Answer(
        body,
        exchange.prompt_tokens or 0,
        exchange.completion_tokens or 0,
        response_id=exchange.response_id,
        text=exchange.text,
        meta=orjson.dumps([exchange.refused_by, passages]),
        changed=changed,
    )


def recall(answer: Answer, exchange: Exchange) -> None:
    """Note what an answer out of the cache says, as if it had just been given. Texts of passages
    are not kept a second time: they stand in the answer's citations."""
    exchange.refused_by, passages = orjson.loads(answer.meta)
    exchange.passages = [
        Passage(n=n, chunk_id=chunk_id, path="", title="", heading="", text="", score=score)
        for n, chunk_id, score in passages
    ]
    exchange.answer = [answer.text]


def refusal() -> Iterator[dict[str, Any]]:
    """The refusal as an engine would stream it. No engine is asked."""
    head = {"id": "", "object": "chat.completion.chunk", "created": int(time.time()), "model": ""}

    def chunk(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    yield chunk({"role": "assistant", "content": ""}, None)
    yield chunk({"content": REFUSAL}, None)
    yield chunk({}, "stop")
    yield {**head, "choices": [], "usage": usage}


def note(chunk: dict[str, Any], exchange: Exchange) -> tuple[str | None, bool]:
    """Take the text out of a chunk.

    Returns the finish reason, and whether the chunk was changed: space before an answer's first
    word is taken away, as it is offline (a nano model's first token is dropped by the engine and
    leaves its space behind).
    """
    choices, changed = chunk.get("choices"), False
    if not choices:
        return None, False
    try:
        delta = choices[0].get("delta") or {}
        text, finish = delta.get("content"), choices[0].get("finish_reason")
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UpstreamError(
            "malformed", "The engine's stream: a chunk without its fields."
        ) from None
    if isinstance(text, str) and text:
        if not exchange.answer and text[0].isspace():
            text, changed = text.lstrip(), True
            delta["content"] = text
        if text:
            exchange.first_text()
            exchange.answer.append(text)
    return (finish if isinstance(finish, str) else None), changed
