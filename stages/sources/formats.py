"""Which format a file has: by its name, and where that says nothing, by its first bytes.

A *kind* is "markdown", "rst", "text", "html", "pdf", "docx", "docstring", or "code:" with Pygments'
name of the language.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

SUFFIXES = {
    ".md": "markdown", ".markdown": "markdown", ".mdx": "markdown", ".qmd": "markdown",
    ".rst": "rst", ".rest": "rst",
    ".txt": "text", ".text": "text", ".log": "text", ".csv": "text", ".tsv": "text",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "docx",
}  # fmt: skip
#: What must be extracted before it is text; the others keep their bytes.
EXTRACTED = {"html": "markdown", "docx": "markdown", "pdf": "text"}


def kind_of(path: str, data: bytes) -> str:
    """The kind of a file. Unknown bytes are "text", and fail when they are decoded."""
    return kind_by_name(path) or kind_by_content(data)


def kind_by_name(path: str) -> str | None:
    name = PurePosixPath(path).name
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    # Lexers are found by pattern: "*.py", "Makefile". The stem only matters without a suffix.
    language = _lexer(f"name{suffix}" if suffix else name)
    return f"code:{language}" if language else None


def text_kind(path: str) -> str:
    """The kind of a text that is called so: extracted already, if it had to be."""
    kind = kind_by_name(path) if path else None
    return "text" if kind is None or kind in EXTRACTED else kind


def kind_by_content(data: bytes) -> str:
    head = data[:4096]
    if head.startswith(b"%PDF-"):
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        return "docx" if b"word/document.xml" in data else "text"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if head.startswith(b"#!"):
        return _script(head.split(b"\n", 1)[0].decode("utf-8", "replace"))
    return "text"


@lru_cache(maxsize=4096)
def _lexer(name: str) -> str | None:
    """Pygments' name of the language of files that are called so."""
    found = _pygments().find_lexer_class_for_filename(name)
    return found.aliases[0] if found is not None and found.aliases else None


def _script(line: str) -> str:
    """The kind of a file that begins with "#!": by its interpreter."""
    words = line[2:].replace("/", " ").split()
    program = next((word for word in words if word not in ("usr", "bin", "env", "-S")), "")
    try:
        lexer = _pygments().find_lexer_class_by_name(program.rstrip("0123456789."))
    except ValueError:  # ClassNotFound is one
        return "text"
    return f"code:{lexer.aliases[0]}"


def _pygments() -> Any:
    from pygments import lexers

    return lexers
