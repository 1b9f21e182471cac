"""Bytes of known kind to what a document row says of them.

In: (kind, bytes). Out: a dict that is JSON: format, title (null: by the file's name), text (only
where it was extracted; other formats keep their bytes), language, headings, problem. A pure
function of its input and of this code, so it is cached, and Ray may run it anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.sources.files import reason
from stages.sources.formats import EXTRACTED
from stages.sources.headings import headings
from stages.sources.language import languages
from stages.sources.sandbox import parse_apart

Parsed = dict[str, Any]
Item = tuple[str, bytes]

#: Syntax trees take 100 times the text's bytes: from here on they are built in a child.
LARGE_CODE = 1 << 18


def parse_batch(items: Sequence[Item], children: int | None = None) -> list[Parsed]:
    """Every item parsed, in order. Nothing that a file holds can raise or stop it."""
    apart = [number for number, item in enumerate(items) if _risky(*item)]
    answers = parse_apart([items[number] for number in apart], children=children)
    there = dict(zip(apart, answers, strict=True))
    found = [
        there[number] if number in there else parse_here(kind, data)
        for number, (kind, data) in enumerate(items)
    ]
    _name_languages(items, found)
    return found


def _risky(kind: str, data: bytes) -> bool:
    return kind in EXTRACTED or (kind == "code:python" and len(data) > LARGE_CODE)


def parse_here(kind: str, data: bytes) -> Parsed:
    """One item, but for its language, in this process. Raises only MemoryError."""
    extracted: Parsed = {}
    title: str | None = None
    try:
        if kind in EXTRACTED:
            from stages.sources.extract import extract

            text, title = extract(kind, data)
            extracted = {"text": text}
        else:
            text, problem = read_text(data)
            if problem:
                return {"problem": problem}
        found = headings(kind, text)
    except MemoryError:
        raise
    except Exception as error:  # a parser's own words, whatever it raises
        return {"problem": _words(kind, error)}
    if found and kind in ("markdown", "rst", "html", "docx"):
        title = found[0]["title"]
    format = "code" if kind.startswith("code:") else EXTRACTED.get(kind, kind)
    return {"format": format, "title": title, "headings": found, **extracted}


def _words(kind: str, error: Exception) -> str:
    """Why a file could not be parsed, in one line."""
    if isinstance(error, RecursionError):
        return f"not readable as {kind}: nested too deeply"
    own = type(error).__name__ in ("Unreadable", "Refused")
    return reason(error) if own else f"not readable as {kind}: {reason(error)}"


def read_text(data: bytes) -> tuple[str, str | None]:
    """The text of the bytes and None, or "" and the reason why they are no text."""
    if b"\0" in data:
        return "", "binary: holds NUL bytes"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {error.start} ({error.reason})"
    return (text, None) if text.strip() else ("", "empty")


def _name_languages(items: Sequence[Item], found: list[Parsed]) -> None:
    """Set ``language``: Pygments' name of code, else what the prose is written in."""
    prose = []
    for number, ((kind, _), parsed) in enumerate(zip(items, found, strict=True)):
        if parsed.get("problem"):
            continue
        if kind.startswith("code:"):
            parsed["language"] = kind.removeprefix("code:")
        else:
            prose.append(number)
    texts = [found[number].get("text") or items[number][1].decode() for number in prose]
    for number, language in zip(prose, languages(texts), strict=True):
        found[number]["language"] = language
