"""Content hashes as DVC computes them, without DVC.

In: a path of the checkout. Out: the md5 that DVC would lock (``….dir`` for a folder). Why: Dagster
needs the versions of sources and code in every process that loads the graph, and importing DVC for
it costs a second. ``tests/dagster_dvc/test_dvc_contract.py`` compares with DVC itself.

A file's hash is the md5 of its bytes; a folder's is the md5 of the JSON list of
``{"md5", "relpath"}`` of its files, sorted by path. ``.dvcignore`` files are obeyed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ALWAYS_IGNORED = {".git", ".hg", ".dvc"}
_REMEMBER_FROM_BYTES = 4 << 20  # hashing less costs under 10 ms; more is remembered by stat


def md5_of_file(path: Path) -> str:
    """The md5 of a file's bytes, in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Ignore:
    """The ``.dvcignore`` files from the DVC root down to a folder, deepest first."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._specs: dict[Path, Any] = {}

    def _spec(self, folder: Path) -> Any:
        if folder not in self._specs:
            path, spec = folder / ".dvcignore", None
            lines = path.read_text().splitlines() if path.is_file() else []
            if any(line.strip() and not line.startswith("#") for line in lines):
                import pathspec  # comes with DVC; 30 ms, paid only where there are patterns

                spec = pathspec.GitIgnoreSpec.from_lines(lines)
            self._specs[folder] = spec
        return self._specs[folder]

    def __call__(self, path: Path, is_dir: bool) -> bool:
        if is_dir and path.name in _ALWAYS_IGNORED:
            return True
        for folder in path.parents:
            spec = self._spec(folder)
            if spec is not None:
                name = path.relative_to(folder).as_posix() + ("/" if is_dir else "")
                verdict = spec.check_file(name).include
                if verdict is not None:
                    return bool(verdict)
            if folder == self._top:
                break
        return False


def walk_files(folder: Path, ignore: Callable[[Path, bool], bool]) -> Iterator[Path]:
    """The files under a folder that DVC would hash, in no particular order."""
    for here, folders, files in os.walk(folder):
        base = Path(here)
        folders[:] = [name for name in folders if not ignore(base / name, True)]
        for name in files:
            if not ignore(base / name, False):
                yield base / name


class Hasher:
    """Hashes paths of one checkout; remembers large files by size, mtime and inode.

    Args:
        top: the folder that holds ``.dvc`` (``.dvcignore`` files count from there).
        memory: JSON file for the remembered hashes, or None to keep none.
    """

    def __init__(self, top: Path, memory: Path | None = None) -> None:
        self._ignore = _Ignore(top)
        self._memory = memory
        self._known: dict[str, list[Any]] | None = None

    def md5(self, path: Path) -> str | None:
        """The md5 that DVC would lock for ``path``; None where there is nothing.

        A folder's ends in ``.dir``. Broken links and special files raise ``OSError``.
        """
        if path.is_dir():
            return self._folder(path)
        return self._file(path) if path.exists() else None

    def _folder(self, folder: Path) -> str:
        entries = [
            {"md5": self._file(path), "relpath": path.relative_to(folder).as_posix()}
            for path in walk_files(folder, self._ignore)
        ]
        entries.sort(key=lambda entry: entry["relpath"])
        listing = json.dumps(entries, sort_keys=True).encode()
        return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"

    def _file(self, path: Path) -> str:
        stat = path.stat()
        if stat.st_size < _REMEMBER_FROM_BYTES or self._memory is None:
            return md5_of_file(path)
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._load()
        if known.get(str(path), [None])[:3] != seen:
            known[str(path)] = [*seen, md5_of_file(path)]
            self._save()
        return str(known[str(path)][3])

    def _load(self) -> dict[str, list[Any]]:
        if self._known is None:
            self._known = {}
            if self._memory is not None:
                try:
                    self._known = dict(json.loads(self._memory.read_text()))
                except (OSError, ValueError):
                    self._known = {}
        return self._known

    def _save(self) -> None:
        if self._memory is None:
            return
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._memory.parent, delete=False) as draft:
                json.dump(self._known, draft)
            Path(draft.name).replace(self._memory)
        except OSError:
            return


def directory_entries(cache: Path, md5: str) -> dict[str, str] | None:
    """The files of a cached folder: relative path → md5. None where the cache lacks it.

    Args:
        cache: DVC's folder of file objects (``.dvc/cache/files/md5``).
        md5: the folder's hash, ending in ``.dir``.
    """
    try:
        entries = json.loads((cache / md5[:2] / md5[2:]).read_text())
    except (OSError, ValueError):
        return None
    return {entry["relpath"]: entry["md5"] for entry in entries}
