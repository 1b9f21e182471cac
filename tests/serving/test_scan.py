"""The scanner: any cut of a stream gives the same events and the same bytes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gateway import scan
from serving.gateway.scan import Scanner
from serving.gateway.sse import MalformedStream

HEAD = {"id": "c-1", "object": "chat.completion.chunk", "model": "nano"}


def chunk(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {**HEAD, "choices": choices, **more}


def event(value: Any, end: str = "\n\n") -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}{end}".encode()


def run(scanner: Scanner, pieces: list[bytes]) -> bytes:
    out = b""
    for piece in pieces:
        out += scanner.feed(piece)
        if scanner.error is not None:
            return out
    return out + scanner.rest()


def seen(scanner: Scanner) -> tuple[Any, ...]:
    """Of an event that is not read, only its size is known, and that to a line end or two."""
    size = 0 if scanner.oversized else scanner.text_bytes
    return (
        scanner.done, scanner.error, scanner.finish_reason, scanner.usage, scanner.events,
        scanner.text_events, size, "".join(scanner.texts), scanner.oversized,
    )  # fmt: skip


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


USAGE = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
TEXTS = st.text(
    st.sampled_from('abc ß☃"\\\n\r\t{}[]:,') | st.characters(exclude_categories=["Cs"]), max_size=12
)
TRICKS = st.sampled_from(['"usage": {"', '"error": {', "data: [DONE]", '"finish_reason":"stop"'])
EVENTS = st.one_of(
    (TEXTS | TRICKS).map(chunk),
    st.just(chunk(None, "stop")),
    st.just(chunk("last", "length", usage=USAGE)),
    st.just(chunk("x", usage=None, error=None)),
    st.just({**HEAD, "choices": [], "usage": USAGE}),
    st.just({"error": {"message": "out of luck", "code": 500}}),
    st.just("[DONE]"),
    st.just("{not json"),
    st.just("x" * 3000),  # above max_event here
)
ENDS = st.sampled_from(["\n\n", "\r\n\r\n", "\r\r", "\n\r\n", "\r\n\n", "\n\n\n"])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    found = b""
    for value, end, extra in draw(
        st.lists(st.tuples(EVENTS, ENDS, st.sampled_from(["", "comment", "lines", "id"])))
    ):
        raw = event(value, end)
        if extra == "comment":
            raw = b": ping" + end.encode() + raw
        if extra == "lines":
            raw = raw.replace(b', "choices"', b',\ndata: "choices"')
        if extra == "id":
            raw = b"event: message\nid: 7\n" + raw
        found += raw
    return found + draw(st.sampled_from([b"", b"data: [DONE]", b"data: {", b"\n"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(streams(), st.lists(st.integers(0, 1 << 20), max_size=12), st.booleans())
def test_any_cut_gives_the_same_events_and_bytes(
    data: bytes, places: list[int], hide: bool
) -> None:
    whole, pieces = (Scanner(hide, want_text=True, max_event=1000) for _ in range(2))
    one, other = run(whole, [data]), run(pieces, cut(data, places))
    if b"\r" in data:  # an empty line may be seen before its LF; only that LF may move
        one, other = one.rstrip(b"\r\n"), other.rstrip(b"\r\n")
    if whole.error is not None:  # nobody counts what stands behind it
        assert seen(whole)[:4] == seen(pieces)[:4]
    else:
        assert seen(whole) == seen(pieces)
    assert one == other
    if not hide and whole.error is None:
        assert one == data or b"\r" in data


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(EVENTS), st.booleans(), st.sampled_from(["", "data:\n\n", "data: [DONE]\n\n"]))
def test_the_short_cuts_read_what_the_long_way_does(
    values: list[Any], hide: bool, last: str
) -> None:
    """A comment in front makes the scanner walk through every event."""
    data = b"".join(event(json.dumps(v, separators=(",", ":"))) for v in values) + last.encode()
    quick, slow = (Scanner(hide, want_text=True) for _ in range(2))
    out = run(quick, [data])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_unmarked", lambda flat: False)
        assert b": ping\n\n" + out == run(slow, [b": ping\n\n" + data])
    assert seen(quick)[:4] == seen(slow)[:4] and seen(quick)[5:] == seen(slow)[5:]
    if last != "data:\n\n":  # without data it is counted where nothing else is looked at
        assert quick.events == slow.events


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(TEXTS | TRICKS, max_size=8), st.integers(1, 7))
def test_texts_are_what_json_says(texts: list[str], step: int) -> None:
    data = b"".join(event(chunk(text)) for text in texts)
    data += event(chunk(None, "stop")) + event("[DONE]")
    scanner = Scanner(want_text=True)
    out = run(scanner, [data[at : at + step] for at in range(0, len(data), step)])
    assert out == data and scanner.done
    assert "".join(scanner.texts) == "".join(texts)
    assert scanner.text_events == sum(bool(text) for text in texts)
    assert (scanner.finish_reason, scanner.error, scanner.usage) == ("stop", None, None)


def test_a_quoted_mark_is_no_mark() -> None:
    tricks = ['{"error": {"code": 500}}', "data: [DONE]\n\n", '"usage": {"completion_tokens": 1}']
    scanner = Scanner(hide_usage=True)
    data = b"".join(event(chunk(trick)) for trick in tricks)
    assert scanner.feed(data) == data
    assert (scanner.done, scanner.error, scanner.usage) == (False, None, None)
    nested = event({**HEAD, "choices": [{"delta": {"x": {"error": {"code": 1}}}}]})
    assert scanner.feed(nested) == nested and scanner.error is None


def test_what_stands_before_an_error_goes_out_and_the_error_does_not() -> None:
    scanner = Scanner()
    first, broken = event(chunk("a")), event({"error": {"code": 500, "message": "x"}})
    assert scanner.feed(first + broken + event("[DONE]")) == first
    assert scanner.error["code"] == 500 and not scanner.done


def test_only_usage_that_nobody_asked_for_is_hidden() -> None:
    last, lone = (
        event(chunk("a", "stop", usage=USAGE)),
        event({**HEAD, "choices": [], "usage": USAGE}),
    )
    scanner = Scanner(hide_usage=True)
    assert scanner.feed(last + lone + event("[DONE]")) == last + event("[DONE]")
    assert scanner.usage == USAGE and scanner.completion_tokens() == (7, False)
    shown = Scanner()
    assert shown.feed(last + lone) == last + lone


def test_half_an_event_waits_for_its_other_half() -> None:
    scanner = Scanner()
    whole = event(chunk("a"))
    assert scanner.feed(whole + whole[:20]) == whole
    assert scanner.feed(whole[20:-1]) == b""
    assert scanner.feed(whole[-1:]) == whole


def test_a_giant_event_is_relayed_unread_and_an_endless_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scanner = Scanner()
    giant = event(chunk("y" * (3 << 20)))
    out = b"".join(scanner.feed(giant[at : at + 65536]) for at in range(0, len(giant), 65536))
    assert out == giant and scanner.oversized == 1 and not scanner.mid_event
    assert scanner.completion_tokens() == (len(giant) // 4 + 1, True)
    after = event("[DONE]")
    assert scanner.feed(after) == after and scanner.done
    monkeypatch.setattr(scan, "MAX_UNENDED", 1 << 21)
    endless = Scanner()
    with pytest.raises(MalformedStream, match="has more than"):
        for _ in range(100):
            endless.feed(b"x" * 65536)


def test_tokens_are_estimated_when_nobody_counts() -> None:
    scanner = Scanner()
    scanner.feed(b"".join(event(chunk(word)) for word in ("a ", "b ", "c ")))
    assert scanner.completion_tokens() == (3, True)
    call = {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 400}}]}
    scanner.feed(event({**HEAD, "choices": [{"delta": call}]}))
    assert scanner.completion_tokens() == (102, True)
