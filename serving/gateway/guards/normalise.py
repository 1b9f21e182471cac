"""A copy of a text in which one word is written one way: guards read it, nobody is sent it.

Compatibility forms, accents, case, zero-width, bidirectional and other invisible characters are
folded away; so are the look-alikes of Latin letters that attacks are written with (Cyrillic,
Greek, Armenian, small capitals). Each character is folded alone, so a place in the copy leads back
to a place in the original.

``views`` adds what a text hides: markup, base64, hexadecimal, escapes, rot13, letters apart, digits
for letters, mirror writing, Unicode tag characters. Each is looked for only where a cheap test
finds a trace of it.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple
from urllib.parse import unquote

#: Letters drawn like a Latin one, which no Unicode decomposition joins with it.
LOOK_ALIKES = dict(
    zip(
        "аеорсухіјѕһԁԛԝвкмнтгѵӏьɡɑαεικνορτυχγηωβօսոհցզꭰꮓᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢıłøđħßæ",
        [
            *"aeopcyxijshdqwbkmhtrvlbgaaeikvoptuxynwbounhgqdzabcdefghijklmnoprstuvwyzilo",
            *("d", "h", "ss", "ae"),
        ],
        strict=True,
    )
)
_QUOTES = dict.fromkeys("“”„«»‟″", '"') | dict.fromkeys("‘’‚‛′", "'")
#: Blank, though letters or marks by category.
_BLANK = {0x115F, 0x1160, 0x3164, 0xFFA0, 0x2800}
_TAGS = re.compile("[\U000e0020-\U000e007e]+")


class _Fold(dict[int, str]):
    """What a code point reads as; computed once each, forgotten when there are many."""

    def __missing__(self, point: int) -> str:
        if len(self) > 20_000:
            self.clear()
        value = self[point] = _folded(chr(point))
        return value


def _folded(character: str) -> str:
    found = []
    for part in unicodedata.normalize("NFKD", character).casefold():
        if ord(part) in _BLANK or unicodedata.category(part) in ("Mn", "Me", "Cf", "Co", "Cs"):
            continue
        found.append(_QUOTES.get(part) or LOOK_ALIKES.get(part, part))
    return "".join(found)


_FOLD = _Fold()


def normalise(text: str) -> str:
    """The copy. An ASCII text is only lower-cased (0.1 us for 250 characters)."""
    return text.lower() if text.isascii() else text.translate(_FOLD)


def origin(text: str, place: int) -> int:
    """Where in ``text`` stands what stands at ``place`` in its copy."""
    if text.isascii():
        return place
    for index, length in enumerate(accumulate(len(_FOLD[ord(sign)]) for sign in text)):
        if length > place:
            return index
    return len(text)


class View(NamedTuple):
    """``text`` is normalised; ``start`` is where in the original it comes from."""

    how: str
    text: str
    start: int


#: Characters of one encoded segment that are decoded, and segments of one text.
SEGMENT, SEGMENTS = 8192, 16
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{20,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*={0,2}")
_HEX = re.compile(r"(?:0x)?(?:[0-9A-Fa-f]{2}[ :,]?){12,}")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u\{?([0-9A-Fa-f]{4,6})\}?)")
_TAG = re.compile(r"</?[a-zA-Z!][^<>]{0,300}>|<!--|-->|[*_`~\\]+")
_APART = re.compile(r"(?:(?<!\w)\w[ .\-_*|/]{1,3}){6,}\w?")
#: Of the lengths of a text's words: letters apart; bytes apart, with or without commas.
_ALONE = (b"\1" * 6, b"\2" * 11, b"\3" * 11)
_LEET = re.compile(r"[013457@$](?<=[a-z].)(?=[a-z])")
_LEET_TABLE = str.maketrans("013457@$", "oieastas")
ROT13_TRACES = (
    "vtaber",
    "qvfertneq",
    "vafgehpgvba",
    "cebzcg",
    "flfgrz",
    "lbh ner",
    "lbhe ",
    "nal ",
)
MIRROR_TRACES = ("snoitcurtsni", "tpmorp", "erongi", "drager", "metsys", "era uoy", " ruoy")


def views(text: str, copy: str) -> Iterator[View]:
    """What ``text`` hides. ``copy`` is its normalised copy."""
    if not text.isascii():
        for tags in _TAGS.finditer(text):
            hidden = "".join(chr(ord(sign) - 0xE0000) for sign in tags.group())
            yield View("tags", hidden.lower(), tags.start())
    if "<" in text or "&" in text or "*" in text or "_" in text or "`" in text or "~" in text:
        yield View("markup", normalise(html.unescape(_TAG.sub("", text))), 0)
    if _encoded(text):
        yield from _decoded(text)
        for letters in _APART.finditer(copy):
            joined = re.sub(r"[\W_]", "", letters.group())
            yield View("apart", joined, origin(text, letters.start()))
    if "\\x" in text or "\\u" in text:
        yield View("escapes", normalise(_ESCAPE.sub(_unescaped, text)), 0)
    if text.count("%") > 4:
        yield View("percent", normalise(unquote(text)), 0)
    if any(trace in copy for trace in ROT13_TRACES):
        yield View("rot13", codecs.encode(copy, "rot13"), 0)
    if any(trace in copy for trace in MIRROR_TRACES):
        yield View("mirror", copy[::-1], 0)
    if _LEET.search(copy):
        yield View("leet", copy.translate(_LEET_TABLE), 0)


def _encoded(text: str) -> bool:
    """Whether words are of lengths that prose does not have: 4 us for 250 characters, where
    searching for the shapes themselves takes 30."""
    try:
        lengths = bytes(map(len, text.split()))
    except ValueError:  # longer than 255
        return True
    return bool(lengths) and (max(lengths) >= 20 or any(run in lengths for run in _ALONE))


def _decoded(text: str) -> Iterator[View]:
    """Segments of base64 and hexadecimal that decode to text."""
    count = 0
    for how, shape in (("hex", _HEX), ("base64", _BASE64)):
        for match in shape.finditer(text):
            raw = match.group()[:SEGMENT]
            data = _from_hex(raw) if how == "hex" else _from_base64(raw)
            found = _as_text(data)
            if found:
                yield View(how, normalise(found), match.start())
                count += 1
                if count >= SEGMENTS:
                    return


def _from_hex(raw: str) -> bytes:
    digits = re.sub(r"[^0-9A-Fa-f]", "", raw.removeprefix("0x"))
    return bytes.fromhex(digits[: len(digits) // 2 * 2])


def _from_base64(raw: str) -> bytes:
    signs = re.sub(r"[\s=]", "", raw).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(signs[: len(signs) // 4 * 4] + _tail(signs))
    except (binascii.Error, ValueError):
        return b""


def _tail(signs: str) -> str:
    """The last two or three signs, padded; one sign alone says nothing."""
    rest = signs[len(signs) // 4 * 4 :]
    return rest + "=" * (4 - len(rest)) if len(rest) > 1 else ""


def _as_text(data: bytes) -> str:
    """The data as text, or "" when it is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data[: len(data) // 2 * 2].decode("utf-16-le", "replace")
    readable = sum(sign.isprintable() or sign.isspace() for sign in text)
    return text if len(text) >= 8 and readable >= 0.95 * len(text) else ""


def _unescaped(match: re.Match[str]) -> str:
    point = int(match[1] or match[2], 16)
    return chr(point) if point < 0x110000 and not 0xD800 <= point < 0xE000 else ""
