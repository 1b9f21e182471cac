"""Server-sent events: cut a byte stream into whole frames, and put our name on relayed ones.

Frames are cut at blank lines whatever the line ending, so a UTF-8 character that the network split
is whole again before anything is decoded. Bytes of a frame are kept as they came: a frame is
parsed to be read and relayed as received, with only the id and the model of its head replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINES = re.compile(rb"\r\n|\n|\r")
#: No engine event is near this; a peer that never ends a line must not fill the memory.
MAX_FRAME = 1 << 20
DONE = b"[DONE]"


class MalformedStream(ValueError):
    """The stream is not what an OpenAI-compatible server sends."""


@dataclass(frozen=True)
class Frame:
    """One event. ``data`` is b"" for comments and keep-alives."""

    raw: bytes
    data: bytes

    @property
    def done(self) -> bool:
        return self.data.strip() == DONE

    def json(self) -> dict[str, Any]:
        """Raises MalformedStream when the data is not a JSON object."""
        try:
            value = json.loads(self.data)
        except (ValueError, RecursionError):
            raise MalformedStream("an event is not JSON") from None
        if not isinstance(value, dict):
            raise MalformedStream("an event is not a JSON object")
        return value


class Frames:
    """Incremental cutter: ``feed`` bytes, take whole frames; ``rest`` at the end of the stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._buffer += data
        start = 0
        for match in _BLANK.finditer(self._buffer):
            raw = bytes(self._buffer[start : match.end()])
            start = match.end()
            yield Frame(raw, _data(raw))
        del self._buffer[:start]
        if len(self._buffer) > MAX_FRAME:
            raise MalformedStream(f"an event has more than {MAX_FRAME} bytes")

    def rest(self) -> Iterator[Frame]:
        """What stands after the last blank line; servers may leave the final one out."""
        if self._buffer.strip():
            raw = bytes(self._buffer) + b"\n\n"
            self._buffer.clear()
            yield Frame(raw, _data(raw))


def _data(raw: bytes) -> bytes:
    """The ``data`` lines of a frame, joined by line feeds as the standard says."""
    found = []
    for line in _LINES.split(raw):
        name, _, value = line.partition(b":")
        if name == b"data":
            found.append(value.removeprefix(b" "))
    return b"\n".join(found)


class Relabel:
    """Puts our response id and model name on the engine's frames without re-serialising them.

    All frames of one stream begin alike, up to ``"choices":``. That head is learnt from the first
    frame and swapped as bytes; a frame with another head is serialised anew.
    """

    def __init__(self, response_id: str, model: str) -> None:
        self.names = {"id": response_id, "model": model}
        self._old = self._new = b""

    def __call__(self, frame: Frame, chunk: dict[str, Any]) -> bytes:
        if not self._old:
            self._learn(frame.raw)
        if self._old and frame.raw.startswith(self._old):
            return self._new + frame.raw[len(self._old) :]
        return encode({**chunk, **self.names})

    def final(self, chunk: dict[str, Any], extra: dict[str, Any]) -> bytes:
        """The frame that carries the finish reason, with our fields added."""
        return encode({**chunk, **self.names, **extra})

    def _learn(self, raw: bytes) -> None:
        head, found, _ = raw.partition(b'"choices":')
        if not found or not head.startswith(b'data: {"id":'):
            return
        try:
            values = json.loads(head[len(b"data: ") :] + b'"choices":[]}')
        except ValueError:
            return
        values.pop("choices")
        renamed = json.dumps({**values, **self.names}, separators=(",", ":"), ensure_ascii=False)
        self._old, self._new = head, b"data: " + renamed[:-1].encode() + b","


def encode(value: dict[str, Any]) -> bytes:
    """A JSON object as one frame."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
