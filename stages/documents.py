"""documents: one source of the knowledge base as typed rows.

In: a source, as ``documents.sources`` in params.yaml names it. Out: a Parquet file of
``stages.document_table``, sorted by path. Why rows with a ``problem``: one unreadable file must
neither stop the run nor vanish. It goes on with its reason and without text, and the stage quality
puts it into quarantine.

Markdown, reStructuredText, plain text and code keep their bytes: ``text.encode()`` is the file.
HTML, PDF and DOCX are extracted. ``md5`` is always of the bytes that were read.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from contracts.errors import ConfigError, InputError
from contracts.params import Params, Source
from contracts.settings import Settings
from stages import harness
from stages.docstrings import docstrings, package_folder
from stages.document_table import document_row, schema
from stages.sources.cached import open_cache, parse_cached, parser
from stages.sources.files import File, Limits, Selection, windows
from stages.sources.folder import local_files
from stages.sources.formats import kind_of
from stages.sources.gitrepo import git_files, pinned_revision
from stages.sources.parse import Parsed
from stages.sources.remote import remote_files
from stages.tables import write_rows

Row = dict[str, Any]

#: Problems that the log lists; all of them stand in the output.
LISTED = 50


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    key: str = paths.key
    source = find_source(key, params)
    rows = read_rows(key, source, params)
    if not rows:
        raise InputError(
            f"The source {key!r} holds no document.",
            where=source.uri,
            next="check documents.sources in params.yaml: its uri, include and exclude",
        )
    write_rows(paths.out, rows, schema())
    problems = [row for row in rows if row["problem"]]
    for row in problems[:LISTED]:
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


def read_rows(key: str, source: Source, params: Params) -> list[Row]:
    """Every document of the source as a row, sorted by path; paths are unique."""
    limits = Limits(params.documents.max_bytes)
    parse = parser(params.documents.engine)
    cache = open_cache()
    rows: list[Row] = []
    try:
        for files in windows(find_files(key, source, limits)):
            kinds = [file.kind or kind_of(file.path, file.data) for file in files]
            readable = [
                (kind, file.data)
                for kind, file in zip(kinds, files, strict=True)
                if file.problem is None
            ]
            answers = iter(parse_cached(readable, cache, parse))
            for kind, file in zip(kinds, files, strict=True):
                parsed = {"problem": file.problem} if file.problem else next(answers)
                rows.append(file_row(key, source, file, kind, parsed))
    finally:
        cache.close()
    return distinct(sorted(rows, key=lambda row: row["path"]))


def find_files(key: str, source: Source, limits: Limits) -> Iterator[File]:
    """The files of a source, by what its uri is. Raises a RatchetError when it cannot be read."""
    uri, selection = source.uri, Selection(source.include, source.exclude)
    if uri.startswith("python:"):
        return python_files(uri.removeprefix("python:"), Path(source.path), selection)
    if uri.startswith("git+"):
        revision = pinned_revision(source.revision, Path(source.path), key)
        caches = Settings.from_env().caches_dir
        return git_files(uri.removeprefix("git+"), revision, caches, selection, limits)
    if "://" in uri:
        return remote_files(uri, key, selection, limits)
    return local_files(uri, key, selection, limits)


def python_files(package: str, lock: Path, selection: Selection) -> Iterator[File]:
    """The docstrings of an installed package; the digest is of the cleaned docstring."""
    folder = package_folder(package, lock)
    for name, text in docstrings(package, folder):
        if selection.wants(name):
            data = text.encode("utf-8", "surrogatepass")
            yield File(name, data, kind="docstring", title=name)


def file_row(key: str, source: Source, file: File, kind: str, parsed: Parsed) -> Row:
    """One file and what its parser said, as a row."""
    problem: str | None = parsed.get("problem")
    text = ""
    if problem is None:
        text = parsed["text"] if "text" in parsed else file.data.decode()
    name = PurePosixPath(file.path)
    return document_row(
        key,
        file.path,
        md5=file.md5 or hashlib.md5(file.data, usedforsecurity=False).hexdigest(),
        title=file.title
        or parsed.get("title")
        or (name.name if kind.startswith("code:") else name.stem),
        text=text,
        git_path=file.git_path,
        format=parsed.get("format") or "text",
        language=file.language or parsed.get("language") or "",
        licence=file.licence or source.licence,
        headings=parsed.get("headings") or (),
        problem=problem,
    )


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows with unique paths: of two under one name, as an archive may hold, the first is read."""
    taken = {row["path"] for row in rows}
    met: Counter[str] = Counter()
    found = []
    for row in rows:
        path = row["path"]
        met[path] += 1
        if met[path] > 1:
            while (name := f"{path} ({met[path]})") in taken:
                met[path] += 1
            taken.add(name)
            problem = row["problem"] or f"another document is called {path} too"
            row = {**row, "path": name, "doc_id": f"{row['source']}:{name}"}
            row |= {"text": "", "headings": [], "problem": problem}
        found.append(row)
    return sorted(found, key=lambda row: row["path"])


if __name__ == "__main__":
    harness.main("documents", run, paths=("out",), options=("key",))
