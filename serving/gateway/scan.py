"""Recognise what matters in a relayed event stream, without parsing every event.

``Scanner.feed(bytes)`` gives back the bytes that may go to the client: whole events, as they came,
coalesced reads as one piece. An event that is not whole yet waits, so that a stream that breaks in
the middle of one can still be ended by an error event of our own. Only events that bear a finish
reason, a usage or an error are parsed; the others cost one pass of a few searches in C.

Why searching bytes is exact: inside a JSON string a quote is written ``\\"``, so ``"usage":`` can
only be a key. What is found is then parsed and looked at in its place.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from serving.gateway.sse import MalformedStream

#: An empty line, whatever ends the lines. A CR before an LF is no line end of its own.
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LINES = re.compile(rb"\r\n|\n|\r")
#: Keys (not null) that make an event worth parsing, and the end of the stream.
_MARKS = re.compile(
    rb'"(?:finish_reason|usage|error)"\s*:\s*(?!null|\s)|data:[ \t]?\[DONE\]\s*(?:\n\n|\Z)'
)
#: What the model wrote, as JSON strings without their quotes: text, reasoning, tool arguments.
#: ``_ANSWER`` is the part of it that people read.
_TEXT = re.compile(
    rb'"(?:content|text|reasoning|reasoning_content|refusal|arguments)"\s*:\s*'
    rb'"([^"\\]*(?:\\.[^"\\]*)*)"',
    re.DOTALL,
)
_ANSWER = re.compile(rb'"(?:content|text)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
#: An event above this is relayed and not looked at.
MAX_EVENT = 1 << 20
#: A peer that never ends an event is not relayed for ever.
MAX_UNENDED = 16 << 20
#: Bytes of text that one token is taken for where the engine does not count. English prose has
#: 4 to 4.5 with common vocabularies; other scripts have more bytes and about as many per token.
BYTES_PER_TOKEN = 4


class Scanner:
    """State of one stream.

    Args:
        hide_usage: leave out the event that carries nothing but usage: only the gateway asked.
        want_text: collect the pieces of text in ``texts`` (for caches, guards and logs).
        max_event: bytes above which an event is relayed unread.
    """

    __slots__ = (
        "_from",
        "_rest",
        "_skipping",
        "_unended",
        "done",
        "error",
        "events",
        "finish_reason",
        "hide_usage",
        "max_event",
        "oversized",
        "text_bytes",
        "text_events",
        "texts",
        "usage",
        "want_text",
    )

    def __init__(
        self, hide_usage: bool = False, want_text: bool = False, max_event: int = MAX_EVENT
    ) -> None:
        self.hide_usage, self.want_text, self.max_event = hide_usage, want_text, max_event
        self.done = False  # [DONE] was seen
        self.error: Any = None  # the value of `error` in an event; the stream ends before it
        self.finish_reason: str | None = None  # the last one that was given
        self.usage: dict[str, Any] | None = None
        self.events = 0  # with data
        self.text_events = 0  # pieces of text; vLLM sends one for each step of an answer
        self.text_bytes = 0
        self.texts: list[str] = []
        self.oversized = 0  # events that were relayed unread
        self._rest = bytearray()  # the event that is not whole yet
        self._from = 0  # where in it to look for its end
        self._skipping = False
        self._unended = 0

    @property
    def mid_event(self) -> bool:
        """Whether the beginning of an event is with the client and its end is not."""
        return self._skipping

    def completion_tokens(self) -> tuple[int, bool]:
        """Tokens of the answers so far, and whether that is an estimate.

        The engine's own count where it gave one. Otherwise the larger of two lower bounds: pieces
        of text (no engine sends more pieces than tokens) and their bytes.
        """
        count = (self.usage or {}).get("completion_tokens")
        if isinstance(count, int) and not isinstance(count, bool):
            return count, False
        return max(self.text_events, -(-self.text_bytes // BYTES_PER_TOKEN)), True

    def feed(self, data: bytes) -> bytes:
        """What may go out now, possibly b"". After ``error`` was found it is what stood before.

        Raises MalformedStream when an event does not end within MAX_UNENDED bytes.
        """
        if self._rest:
            self._rest += data
            cut = _end(self._rest, self._from)
            if cut == 0:
                self._from = max(0, len(self._rest) - 3)
                return self._too_long()
            block = bytes(self._rest[:cut])
            self._rest = self._rest[cut:]
        else:
            cut = _end(data, 0)
            block, self._rest = data[:cut], bytearray(data[cut:])
        self._from = max(0, len(self._rest) - 3)
        if self._skipping:
            first = _BLANK.search(block)
            assert first is not None  # a block ends in an empty line
            before, block = block[: first.end()], block[first.end() :]
            self._skipping, self._unended = False, 0
            self.text_bytes += len(before)
            out = before + self._block(block)
        else:
            out = self._block(block) if block else b""
        if self.error is not None:
            self._rest.clear()
        return out + self._too_long() if self._rest else out

    def rest(self) -> bytes:
        """At the end of the stream: an event whose final empty line was left out."""
        raw = bytes(self._rest)
        self._rest.clear()
        if not raw.strip() or self._skipping:
            return raw
        out = self._block(raw + b"\n\n")
        return out if self.error is not None or not out else raw

    def _too_long(self) -> bytes:
        """Give up waiting for the end of an event of more than ``max_event`` bytes."""
        if not self._skipping and len(self._rest) <= self.max_event + 1:
            return b""
        if not self._skipping:
            self._skipping, self.oversized = True, self.oversized + 1
        keep = 3  # an empty line may stand on the cut
        out = bytes(self._rest[:-keep])
        self._rest, self._from = self._rest[-keep:], 0
        self._unended += len(out)
        self.text_bytes += len(out)
        if self._unended > MAX_UNENDED:
            raise MalformedStream(f"an event has more than {MAX_UNENDED} bytes")
        return out

    def _block(self, block: bytes) -> bytes:
        """Look at whole events; gives what may go out."""
        if not block:
            return block
        flat = block
        plain = block.count(b"\n\n")
        if (
            len(block) > self.max_event
            or block.count(b"\n") != 2 * plain
            or not block.startswith(b"data:")
            or block.count(b"\n\ndata:") != plain - 1
            or b"\r" in block
        ):
            flat = self._flattened(block)
        mark = None if _unmarked(flat) else _MARKS.search(flat)
        if mark is not None:
            if flat is block and b"data:\n" not in block and b"data: \n" not in block:
                block = flat = self._marked_lines(block, mark)
            else:
                block, flat = self._marked(block)
        else:
            self.events += flat.count(b"\n\n")
        pieces = _TEXT.findall(flat)
        if pieces:
            size = len(b"".join(pieces))
            if size:
                self.text_bytes += size
                self.text_events += len(pieces) - pieces.count(b"")
                if self.want_text:
                    self.texts += [_text(piece) for piece in _ANSWER.findall(flat) if piece]
        return block

    def _flattened(self, block: bytes) -> bytes:
        """The same events, each as one ``data: ...`` line: no comments, no CR, no oversized ones.

        The data lines of an event are joined by a space in place of the standard's line feed: in
        JSON both are space between two tokens.
        """
        found = []
        for raw in _events(block):
            if len(raw) > self.max_event + 2:
                self.oversized += 1
                self.text_bytes += len(raw)
                continue
            data = _data(raw)
            if data:
                found.append(b"data: " + data + b"\n\n")
        return b"".join(found)

    def _marked_lines(self, block: bytes, mark: re.Match[bytes] | None) -> bytes:
        """What :meth:`_marked` does, for events of one ``data`` line each and none without data:
        only those with a mark are looked at, ``mark`` first. A whole answer often comes in one
        read."""
        kept, start, at = [], 0, 0
        while mark is not None:
            before = block.rfind(b"\n\n", at, mark.start())
            begin = at if before < 0 else before + 2
            at = block.find(b"\n\n", mark.start()) + 2
            data = block[begin + 5 : at - 2].removeprefix(b" ")
            if _MARKS.search(b"data: " + data + b"\n\n") is not None and not self._read(data):
                kept.append(block[start:begin])
                start = at
                if self.error is not None:
                    break
                self.events += 1
            mark = _MARKS.search(block, at)
        else:
            kept.append(block[start:])
        out = b"".join(kept)
        self.events += out.count(b"\n\n")
        return out

    def _marked(self, block: bytes) -> tuple[bytes, bytes]:
        """Read the events that bear a mark. Gives the block and its flat form without what must
        not go out: usage that only we asked for, and everything from an error on."""
        keep_raw, keep_flat = [], []
        for raw in _events(block):
            data = _data(raw) if len(raw) <= self.max_event + 2 else b""
            line = b"data: " + data + b"\n\n"
            if data and _MARKS.search(line) is not None and not self._read(data):
                # Line ends before it belong to the event before: an LF whose CR was cut off.
                keep_raw.append(raw[: len(raw) - len(raw.lstrip(b"\r\n"))])
                if self.error is not None:
                    break
                self.events += 1
                continue
            self.events += bool(data)
            keep_raw.append(raw)
            if data:
                keep_flat.append(line)
        return b"".join(keep_raw), b"".join(keep_flat)

    def _read(self, data: bytes) -> bool:
        """One event with a mark; whether it may go out."""
        if data.strip() == b"[DONE]":
            self.done = True
            return True
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            return True  # the client's parser may think otherwise
        if not isinstance(value, dict):
            return True
        if value.get("error") is not None:
            self.error = value["error"]
            return False
        choices = value.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str):
                self.finish_reason = choice["finish_reason"]
        if isinstance(value.get("usage"), dict):
            self.usage = value["usage"]
            return not (self.hide_usage and choices == [])
        return True


def _unmarked(flat: bytes) -> bool:
    """Whether it is certain that no event bears a mark, at a tenth of what the search costs: most
    events say ``"finish_reason":null``."""
    return (
        b'"error"' not in flat
        and b"[DONE]" not in flat
        and flat.count(b'"finish_reason"') == flat.count(b'"finish_reason":null')
        and flat.count(b'"usage"') == flat.count(b'"usage":null')
    )


def _end(data: bytes | bytearray, start: int) -> int:
    """Where the last whole event ends; 0 when none does. Looks from ``start`` on."""
    if data.find(b"\r", start) < 0:
        return data.rfind(b"\n\n", start) + 2 if data.find(b"\n\n", start) >= 0 else 0
    end = 0
    for match in _BLANK.finditer(data, start):
        end = match.end()
    return end


def _events(block: bytes) -> list[bytes]:
    """The block cut after each empty line; joined they are the block."""
    found, start = [], 0
    for match in _BLANK.finditer(block):
        found.append(block[start : match.end()])
        start = match.end()
    return [*found, block[start:]] if start < len(block) else found  # one line end too many


def _data(raw: bytes) -> bytes:
    """The data of one event, on one line."""
    found = []
    for line in _LINES.split(raw):
        if line.startswith(b"data:"):
            found.append(line[5:].removeprefix(b" "))
    return b" ".join(found)


def _text(piece: bytes) -> str:
    """A JSON string without its quotes, decoded; lone surrogates become U+FFFD."""
    if b"\\" not in piece:
        return piece.decode("utf-8", "replace")
    try:
        return str(orjson.loads(b'"' + piece + b'"'))
    except orjson.JSONDecodeError:
        return piece.decode("utf-8", "replace")
