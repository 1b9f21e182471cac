"""A folder, a file or a glob of this machine, usually of the repository.

Linked folders are not entered; a linked file is read if it leads to a file inside the folder. What
can be listed and not read is yielded with its problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from contracts.digests import file_md5
from contracts.errors import InputError
from stages.sources import containers
from stages.sources.files import File, Limits, Selection, reason, shown, split_glob


def local_files(uri: str, key: str, selection: Selection, limits: Limits) -> Iterator[File]:
    """Files of the source in the order of their names. Raises InputError when there is no uri."""
    base, glob = split_glob(uri)
    root = Path(base)
    if glob is not None:
        wanted = Selection([glob], selection.exclude)
        for file in local_files(base, key, wanted, limits):
            if not selection.include or selection.wants(file.path):
                yield file
        return
    if root.is_dir():
        yield from _folder(root, selection, limits)
    elif root.is_file():
        if containers.is_container(root.name):
            with root.open("rb") as stream:
                yield from containers.members(root.name, stream, selection, limits)
        else:
            yield _file(root.parent, root.name, limits)
    else:
        raise InputError(
            f"The folder or file of the source {key!r} does not exist.",
            where=str(root),
            next="check documents.sources in params.yaml; run from the repository root",
        )


def _folder(root: Path, selection: Selection, limits: Limits) -> Iterator[File]:
    failed: list[OSError] = []
    for parent, names, files in os.walk(root, onerror=failed.append):
        relative = os.path.relpath(parent, root)
        prefix = "" if relative == "." else f"{relative}/"
        names[:] = sorted(name for name in names if selection.enters(shown(prefix + name)))
        for name in sorted(files):
            path = prefix + name
            if not selection.wants(shown(path)):
                continue
            if containers.is_container(name):
                yield from _container(root, path, selection, limits)
            else:
                yield _file(root, path, limits)
    for error in failed:
        path = os.path.relpath(error.filename, root)
        yield File(shown(path), problem=f"the folder cannot be read: {reason(error)}")


def _container(root: Path, path: str, selection: Selection, limits: Limits) -> Iterator[File]:
    problem = _link_problem(root, root / path)
    if problem is None:
        try:
            stream = (root / path).open("rb")
        except OSError as error:
            problem = f"cannot be read: {reason(error)}"
    if problem is not None:
        yield File(shown(path), problem=problem)
        return
    with stream:
        chosen = selection.members()
        yield from containers.members(shown(path), stream, chosen, limits, prefix=True)


def _file(root: Path, path: str, limits: Limits) -> File:
    """One file's bytes, or the reason why they could not be had."""
    file, name = root / path, shown(path)
    git_path = None if root.is_absolute() or ".." in root.parts else (root / name).as_posix()
    data, md5 = b"", None
    problem = _link_problem(root, file)
    if problem is None:
        try:
            problem = limits.too_large(file.stat().st_size)
            if problem:
                md5 = file_md5(file)
            else:
                data = file.read_bytes()
        except (OSError, ValueError) as error:
            problem = f"cannot be read: {reason(error)}"
    return File(name, data, problem, git_path, md5)


def _link_problem(root: Path, file: Path) -> str | None:
    """Why the file must not be opened, or None: a pipe would block, a link may lead anywhere."""
    try:
        if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            return "a link that leads out of the folder"
        return None if file.is_file() else "not a regular file, or a broken link"
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"cannot be read: {reason(error)}"
