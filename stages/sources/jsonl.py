"""JSON lines: one document a line.

Keys: ``text``; optional ``path``, ``id``, ``title``, ``language``, ``licence``. A document is
called by its path, by its id, by "path#id" where it has both, else by its line number. The text is
a text already: Markdown, reStructuredText or code where the path ends so, else plain.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from stages.sources.files import File, Limits, leads_out, reason, shown
from stages.sources.formats import text_kind

KEYS = ("path", "id", "title", "language", "licence")


def json_lines(stream: IO[bytes], limits: Limits) -> Iterator[File]:
    """The documents of a stream; a line that cannot be used is a File with its problem."""
    number = 0
    # A line holds escapes and other keys beside its text: "\\u0000" is six bytes for one.
    longest = 6 * limits.max_bytes + 4096
    while line := stream.readline(longest):
        number += 1
        if len(line) == longest:
            while line and not line.endswith(b"\n"):
                line = stream.readline(longest)
            problem = f"line {number}: more than the limit of {limits.max_bytes:,} bytes"
            yield File(f"line {number}", problem=problem)
        elif line.strip():
            yield _line(line, number, limits)


def _line(line: bytes, number: int, limits: Limits) -> File:
    """One line as a File."""
    name = f"line {number}"
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        problem = _problem(record)
        data = b"" if problem else record["text"].encode()
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, lone surrogates
        return File(name, line, f"line {number}: not JSON text: {reason(error)}")
    if problem:
        return File(name, line, f"line {number}: {problem}")
    given = {key: str(record[key]) for key in KEYS if record.get(key) not in (None, "")}
    path = "#".join(given[key] for key in ("path", "id") if key in given) or name
    if leads_out(path):
        return File(name, line, f"line {number}: its path leads out of the source")
    too_large = limits.too_large(len(data))
    return File(
        path=shown(path.encode("utf-8", "surrogateescape")),
        data=b"" if too_large else data,
        problem=f"line {number}: {too_large}" if too_large else None,
        kind=text_kind(given.get("path", "")),
        title=given.get("title"),
        language=given.get("language"),
        licence=given.get("licence"),
    )


def _problem(record: Any) -> str | None:
    """What is wrong with a parsed line, or None."""
    if not isinstance(record, dict):
        return "not an object"
    if not isinstance(record.get("text"), str):
        return "no text" if "text" not in record else "its text is not a string"
    for key in KEYS:
        value = record.get(key)
        if value is not None and not isinstance(value, str | int):
            return f"its {key} is neither text nor a number"
        if isinstance(value, str):
            value.encode()  # a lone surrogate: ValueError
    return None
