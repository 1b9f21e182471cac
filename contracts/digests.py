"""MD5 of files and folders exactly as DVC writes them into dvc.lock.

A file's digest is the MD5 of its bytes. A folder's is the MD5 of its manifest: a JSON list of
``{"md5", "relpath"}`` sorted by path, with ``.dir`` appended (dvc-data's ``Tree``; dvc.lock schema
2.0). So a digest computed here resolves in DVC's cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_md5(path: Path) -> str:
    """MD5 of the file's bytes, 32 hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def dir_md5(path: Path) -> str:
    """MD5 of the folder's DVC manifest, with ``.dir``."""
    files = {
        item.relative_to(path).as_posix(): file_md5(item)
        for item in path.rglob("*")
        if item.is_file()
    }
    return tree_md5(files)


def tree_md5(files: dict[str, str]) -> str:
    """:func:`dir_md5` of a folder whose files' MD5 are known, by path inside it."""
    rows = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    text = json.dumps(rows, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def path_md5(path: Path) -> str:
    """:func:`dir_md5` or :func:`file_md5`, by what ``path`` is."""
    return dir_md5(path) if path.is_dir() else file_md5(path)


def path_size(path: Path) -> int:
    """Bytes of the file, or of all files below the folder."""
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size


def text_sha(text: str) -> str:
    """SHA-256 of the UTF-8 text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
