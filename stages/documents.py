"""documents: one source of the knowledge base as typed rows.

In: a folder of the repository (every ``*.md``), or the docstrings of an installed package; which,
says ``documents.sources`` in params.yaml. Out: a Parquet file of :data:`SCHEMA`, sorted by path.
Why rows with a ``problem``: one unreadable file must neither stop the run nor vanish. It goes on
with its reason and without text, and the stage quality puts it into quarantine.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import file_md5
from contracts.errors import ConfigError, InputError
from contracts.params import Params, Source
from stages import harness
from stages.docstrings import docstrings, package_folder
from stages.markdown import first_heading
from stages.tables import write_rows

if TYPE_CHECKING:
    import pyarrow as pa

#: Larger files are not read: a text of this length is 40 novels.
MAX_BYTES = 16 << 20

#: Folders below a source that are not part of the guide: decision records talk to developers.
EXCLUDED = {"decisions"}

Row = dict[str, Any]


def schema() -> pa.Schema:
    """``contracts.records.Document`` and ``problem``: why a row has no usable text, or null."""
    import pyarrow as pa

    names = ("doc_id", "source", "path", "title", "md5", "text", "git_path", "problem")
    return pa.schema([(name, pa.string()) for name in names])


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    key: str = paths.key
    source = find_source(key, params)
    scheme, _, name = source.uri.partition(":")
    if scheme == "python" and name:
        rows = sorted(python_rows(key, name, Path(source.path)), key=lambda row: row["path"])
    else:
        rows = sorted(folder_rows(key, Path(source.uri)), key=lambda row: row["path"])
    if not rows:
        raise InputError(
            f"The source {key!r} holds no document.",
            where=source.uri,
            next="check documents.sources in params.yaml",
        )
    write_rows(paths.out, rows, schema())
    problems = [row for row in rows if row["problem"]]
    for row in problems:
        harness.progress(f"{row['doc_id']}: {row['problem']}")
    characters = sum(len(row["text"]) for row in rows)
    harness.progress(
        f"{key}: {len(rows)} documents, {characters:,} characters, {len(problems)} unreadable"
    )
    return {
        "documents": float(len(rows)),
        "characters": float(characters),
        "unreadable": float(len(problems)),
    }


def find_source(key: str, params: Params) -> Source:
    """The source of that key. Raises ConfigError with the nearest known key."""
    sources = params.documents.sources
    if key in sources:
        return sources[key]
    near = difflib.get_close_matches(key, sources, n=1)
    raise ConfigError(
        f"There is no source {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
        where="params.yaml: documents.sources",
        next=f"use one of: {', '.join(sources)}",
    )


def python_rows(key: str, package: str, lock: Path) -> Iterator[Row]:
    """The docstrings of an installed package; the digest is of the cleaned docstring."""
    folder = package_folder(package, lock)
    for name, text in docstrings(package, folder):
        data = text.encode("utf-8", "surrogatepass")
        text, problem = read_text(data)
        yield _row(key, name, name, data, text, None, problem)


def folder_rows(key: str, folder: Path) -> Iterator[Row]:
    """Every ``*.md`` below ``folder``; hidden and excluded folders are left out.

    Linked folders are not entered; a linked file is read if it leads to a file inside ``folder``.
    """
    if not folder.is_dir():
        raise InputError(
            f"The folder of the source {key!r} does not exist.",
            where=str(folder),
            next="check documents.sources in params.yaml; run from the repository root",
        )
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".") and name not in EXCLUDED]
        for name in files:
            if name.endswith(".md") and not name.startswith("."):
                yield file_row(key, folder, Path(parent) / name)


def file_row(key: str, folder: Path, file: Path) -> Row:
    """One file as a row; what cannot be read becomes a row with a problem."""
    relative = file.relative_to(folder).as_posix()
    path = os.fsencode(relative).decode("utf-8", "backslashreplace")
    git_path = (folder / path).as_posix()
    data, text = b"", ""
    md5: str | None = None
    try:
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            problem: str | None = "a link that leads out of the folder"
        elif not file.is_file():
            problem = "not a regular file, or a broken link"
        elif file.stat().st_size > MAX_BYTES:
            problem = f"{file.stat().st_size:,} bytes, more than the limit of {MAX_BYTES:,}"
            md5 = file_md5(file)
        else:
            data = file.read_bytes()
            text, problem = read_text(data)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    row = _row(key, path, first_heading(text) or file.stem, data, text, git_path, problem)
    if md5 is not None:
        row["md5"] = md5
    return row


def read_text(data: bytes) -> tuple[str, str | None]:
    """The text of the bytes and None, or "" and the reason why they are no text."""
    if b"\0" in data:
        return "", "binary: holds NUL bytes"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {error.start} ({error.reason})"
    return (text, None) if text.strip() else ("", "empty")


def _row(
    key: str,
    path: str,
    title: str,
    data: bytes,
    text: str,
    git_path: str | None,
    problem: str | None,
) -> Row:
    """A row of :func:`schema`; ``data`` are the source bytes."""
    return {
        "doc_id": f"{key}:{path}",
        "source": key,
        "path": path,
        "title": title.encode("utf-8", "replace").decode(),
        "md5": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        "text": text,
        "git_path": git_path,
        "problem": problem,
    }


if __name__ == "__main__":
    harness.main("documents", run, paths=("out",), options=("key",))
