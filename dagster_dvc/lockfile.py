"""``dvc.lock`` as typed values.

In: the file's bytes. Out: ``LockedStage`` per resolved stage name: what DVC recorded when the
stage last succeeded. The lock is the only witness that both drivers share, so every version that
Dagster sees is read from here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import DagsterDvcError
from .yaml12 import loads

# DVC empties the lock, then renders it (16 stages: 10 ms), then writes it. On a machine with more
# work than cores that took over 30 ms, and the sensor saw a project in which nothing had run.
_STILL_S, _EMPTIED_S, _STILL_TRIES = 0.03, 1.0, 40


class LockUnreadable(DagsterDvcError):
    """``dvc.lock`` is no YAML, or not of the shape that DVC writes."""


@dataclass(frozen=True)
class LockedFile:
    """One recorded file or folder: its md5 (``….dir`` for a folder), bytes and number of files."""

    md5: str
    size: int | None
    nfiles: int | None


@dataclass(frozen=True)
class LockedStage:
    """What DVC recorded for one stage. Paths are as the lock spells them (from the wdir)."""

    cmd: str | Sequence[str]
    deps: Mapping[str, LockedFile]
    params: Mapping[str, Mapping[str, Any]]
    outs: Mapping[str, LockedFile]


def _files(entries: Sequence[Mapping[str, Any]]) -> dict[str, LockedFile]:
    found: dict[str, LockedFile] = {}
    for entry in entries:
        version = entry.get("md5") or entry.get("etag") or entry.get("checksum") or ""
        found[str(entry["path"])] = LockedFile(
            md5=str(version), size=entry.get("size"), nfiles=entry.get("nfiles")
        )
    return found


def parse(content: bytes) -> dict[str, LockedStage]:
    """Parse the bytes of ``dvc.lock``. An empty file is an empty lock.

    Raises:
        LockUnreadable: no YAML, or of another shape (a merge conflict, for example).
    """
    try:
        document = loads(content) or {}
        stages = document.get("stages") or {}
        return {
            str(name): LockedStage(
                cmd=entry["cmd"],
                deps=_files(entry.get("deps") or ()),
                params={str(k): dict(v or {}) for k, v in (entry.get("params") or {}).items()},
                outs=_files(entry.get("outs") or ()),
            )
            for name, entry in stages.items()
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise LockUnreadable(
            f"dvc.lock cannot be read ({type(error).__name__}: {error}). "
            "Next: look for merge markers in it, or take it from git (`git checkout dvc.lock`)."
        ) from error


def read(path: Path) -> dict[str, LockedStage]:
    """Parse the file; a missing one is an empty lock (nothing has run yet).

    DVC writes it in place: one that was touched a moment ago is read until it stands still, and one
    that is empty or ends in the middle of a line for a second longer.
    """
    try:
        content = path.read_bytes()
        for _ in range(_STILL_TRIES):
            whole = content.endswith(b"\n")
            if time.time() - path.stat().st_mtime > (_STILL_S if whole else _EMPTIED_S):
                break
            time.sleep(_STILL_S)
            before, content = content, path.read_bytes()
            if content == before and whole:
                break
    except FileNotFoundError:
        return {}
    return parse(content)
