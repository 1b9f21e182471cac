"""Personal data and secrets by pattern, in whole texts and in texts that arrive in pieces.

``find(text)`` gives the spans of a whole text. ``HoldBack`` gives the same for a stream: what could
still be, or become, part of a finding waits; everything else goes on at once. In prose that is the
last word; in the worst case HOLD characters, from where on a run without any break is cut where no
finding stands (so a finding longer than REACH inside a longer run may be missed; none is: the
longest, an e-mail address of eight labels, has 614).

Why a cut is safe: every finding consists of WORD characters, with single spaces inside only if a
digit stands before the space in an unbroken run of CHAIN characters (cards, phones, IBANs). So the
place behind any other character splits none, and the recognisers see CONTEXT characters before it.
Private keys are the exception and have states of their own.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import NamedTuple

from resources.recognisers.pii import find_pii
from resources.recognisers.secrets import (
    BODY,
    KEY_HEAD,
    MAX_BODY,
    MIN_BODY,
    api_keys,
    is_key_body,
    private_keys,
)
from resources.recognisers.spans import Found, without_overlap

WORD = string.ascii_letters + string.digits + "._%+@:()-"
CHAIN = string.ascii_uppercase + string.digits + " .()+-"
HOLD, REACH, CONTEXT = 1024, 640, 16

_DIGIT = re.compile(r"[0-9]")
_BEGIN = "-----BEGIN "
#: What may still become the head of a private key.
_HEAD_SO_FAR = re.compile(r"-----BEGIN [A-Z0-9 ]{0,60}-{0,5}")


class Piece(NamedTuple):
    """A settled part of the text. ``kind`` is None for what is no finding; ``again`` marks the
    continuation of the finding before."""

    text: str
    kind: str | None = None
    again: bool = False


def find(text: str) -> list[Found]:
    """Every finding of a whole text, in order, none overlapping. Private keys come first."""
    if "PRIVATE KEY" not in text:
        return _plain(text, 0)
    spans: list[Found] = []
    start = 0
    for key in private_keys(text):
        spans += [span for span in _plain(text, start) if span.end <= key.start]
        spans.append(key)
        start = key.end
    return [*spans, *_plain(text, start)]


def _plain(text: str, start: int) -> list[Found]:
    """All but private keys."""
    found = find_pii(text, start)
    keys = api_keys(text, start)
    return without_overlap(keys + found) if keys else found


def safe_cut(text: str, start: int) -> int:
    """The last place from ``start`` on that no finding spans, whatever follows the text."""
    cut = len(text.rstrip(WORD))
    while cut > start:
        if text[cut - 1] != " ":
            return cut
        chain = max(start, len(text[:cut].rstrip(CHAIN)))
        digit = _DIGIT.search(text, chain, cut)
        if digit is None:
            return cut
        cut = len(text[: digit.start()].rstrip(WORD))
    return start


class HoldBack:
    """``feed`` pieces of a text, take settled ones; ``close`` settles the rest."""

    def __init__(self) -> None:
        self._text = ""  # at most CONTEXT settled characters, then what waits
        self._start = 0  # where the waiting part begins
        self._key: str | None = None  # inside a private key: its kind of block
        self._body = 0  # characters that its body may still have

    @property
    def held(self) -> int:
        """Characters that wait."""
        return len(self._text) - self._start

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        return self._settle(False)

    def close(self) -> list[Piece]:
        return self._settle(True)

    def _settle(self, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._start < len(self._text):
            step = self._in_key(last) if self._key else self._outside(last)
            if not step:
                break
            pieces += step
        drop = self._start - CONTEXT
        if drop > 0:
            self._text, self._start = self._text[drop:], CONTEXT
        return pieces

    def _outside(self, last: bool) -> list[Piece]:
        """Settle up to the last safe place of the next HOLD characters; [] when there is none."""
        left = max(0, self._start - CONTEXT)
        full = len(self._text) - self._start >= HOLD
        window = self._text[left : self._start + HOLD]
        start = self._start - left
        last = last and self._start + HOLD >= len(self._text)
        key, undecided = self._key_head(window, start, last) if _BEGIN in window else (None, -1)
        if key:
            cut = key.start()
        elif undecided >= 0:
            cut = safe_cut(window[:undecided], start)
        else:
            cut = len(window) if last else safe_cut(window, start)
        if cut == start and not key and not full:
            return []
        spans = _plain(window, start)
        if cut == start and not key:  # a run without a break
            cut = min(start + HOLD - REACH, undecided if undecided >= 0 else len(window))
            cut = next((span.end for span in spans if span.start < cut < span.end), cut)
        pieces = list(_pieces(window, start, cut, spans))
        if key:
            self._key, self._body = key["what"], MAX_BODY
            pieces.append(Piece(key.group(), "private_key"))
            cut = key.end()
        self._start = left + cut
        return pieces

    @staticmethod
    def _key_head(window: str, start: int, last: bool) -> tuple[re.Match[str] | None, int]:
        """(the head of the first private key, -1), or (None, where one may begin or -1)."""
        at = window.find(_BEGIN, start)
        while at >= 0:
            head = KEY_HEAD.match(window, at)
            if head is None:
                if not last and _HEAD_SO_FAR.fullmatch(window, at):
                    return None, at
            else:
                end = window.find("-", head.end())
                body = window[head.end() : end if end >= 0 else len(window)]
                if end < 0 and len(body) < BODY and not last:
                    return None, at
                if len(body) >= MIN_BODY and is_key_body(body):
                    return head, -1
            at = window.find(_BEGIN, at + 1)
        return None, -1

    def _in_key(self, last: bool) -> list[Piece]:
        """Settle what belongs to the private key; afterwards ``_key`` is None at its end."""
        begin, end = self._start, min(len(self._text), self._start + self._body)
        hyphen = self._text.find("-", begin, end)
        stop = end if hyphen < 0 else hyphen
        self._body -= stop - begin
        if hyphen >= 0 or self._body == 0:  # the body is over
            mark = f"-----END {self._key}-----"
            rest = self._text[stop : stop + len(mark)]
            if rest == mark:
                stop += len(mark)
            elif not last and mark.startswith(rest):
                self._body = 0
                self._start = stop
                return [Piece(self._text[begin:stop], "private_key", True)] if stop > begin else []
            self._key = None
        self._start = stop
        return [Piece(self._text[begin:stop], "private_key", True)]


def _pieces(text: str, start: int, end: int, spans: list[Found]) -> Iterator[Piece]:
    """``text[start:end]`` by finding; spans beyond are left out."""
    for span in spans:
        if span.end > end:
            break
        if span.start > start:
            yield Piece(text[start : span.start])
        yield Piece(text[span.start : span.end], span.kind)
        start = span.end
    if start < end:
        yield Piece(text[start:end])
