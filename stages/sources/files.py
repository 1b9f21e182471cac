"""What every kind of source yields: files with their bytes, and which of them are wanted.

Paths are relative to the source, with "/" between folders. Hidden files and folders (a leading
dot) are never wanted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

#: A window of files is parsed at once: enough to keep every core busy, little enough to hold.
WINDOW_FILES, WINDOW_BYTES = 2048, 32 << 20

CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class File:
    """One document as it was found, before it is parsed."""

    path: str  # as `shown` writes it
    data: bytes = b""
    problem: str | None = None  # why ``data`` could not be read, or must not be used
    git_path: str | None = None
    md5: str | None = None  # of bytes that were not kept: a file over the limit
    kind: str | None = None  # for stages.sources.parse; None: told by name and content
    title: str | None = None  # these three only where the source itself says so
    language: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Limits:
    """What may be read. Everything beyond goes to quarantine with these figures."""

    max_bytes: int  # a file
    members: int = 100_000  # of an archive
    ratio: int = 200  # unpacked to packed: deflate's ceiling is 1,032, prose reaches 5, XML 50

    @property
    def total(self) -> int:
        """Bytes that an archive may unpack to."""
        return 16 * self.max_bytes

    def too_large(self, count: int) -> str | None:
        if count <= self.max_bytes:
            return None
        return f"{count:,} bytes, more than the limit of {self.max_bytes:,}"


@dataclass(frozen=True)
class Selection:
    """Globs over paths: ``*`` and ``?`` stay inside a folder, ``**/`` is any folders or none."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    _include: tuple[re.Pattern[str], ...] = field(init=False, repr=False)
    _exclude: tuple[re.Pattern[str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_include", tuple(glob_pattern(item) for item in self.include))
        object.__setattr__(self, "_exclude", tuple(glob_pattern(item) for item in self.exclude))

    def wants(self, path: str) -> bool:
        if any(part.startswith(".") and not part.startswith("..") for part in path.split("/")):
            return False
        if self._excludes(path):
            return False
        return not self._include or any(item.fullmatch(path) for item in self._include)

    def enters(self, folder: str) -> bool:
        """Whether anything below ``folder`` can be wanted: what is excluded whole is not walked."""
        name = folder.rsplit("/", 1)[-1]
        return not name.startswith(".") and not self._excludes(f"{folder}/")

    def members(self) -> Selection:
        """For what an archive holds that was itself selected: only ``exclude`` speaks."""
        return Selection((), self.exclude)

    def _excludes(self, path: str) -> bool:
        return any(item.fullmatch(path) for item in self._exclude)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The glob as a regular expression. ``decisions/**`` matches the folder's path with "/" too."""
    found = []
    position = 0
    while position < len(glob):
        if glob.startswith("**/", position):
            found.append("(?:[^/]+/)*")
            position += 3
        elif glob.startswith("**", position):
            found.append(".*")
            position += 2
        else:
            sign = glob[position]
            found.append({"*": "[^/]*", "?": "[^/]"}.get(sign, re.escape(sign)))
            position += 1
    return re.compile("".join(found), re.DOTALL)


def split_glob(uri: str) -> tuple[str, str | None]:
    """("docs", "**/*.md") of "docs/**/*.md"; ("docs", None) where nothing is a wildcard."""
    parts = uri.split("/")
    for number, part in enumerate(parts):
        if "*" in part or "?" in part:
            base = "/".join(parts[:number]) or ("/" if uri.startswith("/") else ".")
            return base, "/".join(parts[number:])
    return uri, None


def shown(path: str | bytes) -> str:
    """A path that prints on one line and is UTF-8; different paths stay different.

    Bytes that are no UTF-8, control characters and the backslash itself are written as escapes.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    text = CONTROL.sub(_escape, text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escape(match: re.Match[str]) -> str:
    sign = match[0]
    return {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(sign, f"\\x{ord(sign):02x}")


def leads_out(name: str) -> bool:
    """Whether a name inside a container points outside of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))


def reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters: its own words, else its name."""
    words = getattr(error, "strerror", None) or " ".join(str(error).split())
    return (words or type(error).__name__)[:200]


def windows(files: Iterable[File]) -> Iterator[list[File]]:
    """The files in order, in lists that fit into memory."""
    held: list[File] = []
    count = 0
    for file in files:
        held.append(file)
        count += len(file.data)
        if len(held) >= WINDOW_FILES or count >= WINDOW_BYTES:
            yield held
            held, count = [], 0
    if held:
        yield held
