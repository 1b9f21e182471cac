"""The published index: the newest knowledge that passed its checks, behind one pointer.

In: an index directory that a stage built. Out: an immutable copy under
``<state>/indexes/<content digest>/`` and the pointer file ``<state>/published_index.json``, which
is replaced in one step. A reader opens what the pointer names; whoever opened the older one keeps
it.
A publish that dies half-way leaves the old pointer in place and a ``.part`` folder that the next
publish removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from contracts.digests import path_md5
from contracts.errors import InputError, NotFoundError
from contracts.settings import Settings

KEEP = 3  # indexes kept for readers that still hold one, and for rollback


def publish(index: Path, settings: Settings) -> dict[str, str | None]:
    """Copy ``index`` under its digest and point to it. Returns {"md5", "path", "previous"}.

    Raises:
        InputError: ``index`` has no manifest, so its build did not finish.
    """
    if not (index / "manifest.json").is_file():
        raise InputError(
            "This index is not whole: it has no manifest.json.",
            where=str(index),
            next="run `dvc repro index`",
        )
    home = settings.state_dir / "indexes"
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in home.glob("*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        md5 = path_md5(index)
        target = home / md5.removesuffix(".dir")
        if not target.exists():
            part = target.with_suffix(".part")
            shutil.copytree(index, part)
            if path_md5(part) != md5:  # the workspace changed under the copy
                shutil.rmtree(part)
                raise InputError(
                    "The index changed while it was copied.",
                    where=str(index),
                    next="publish again when no `dvc repro` is running",
                )
            os.replace(part, target)
        previous = published(settings)
        pointer = {
            "md5": md5,
            "path": str(target.relative_to(settings.state_dir)),
            "previous": previous["md5"] if previous and previous["md5"] != md5 else None,
        }
        part_file = _pointer(settings).with_suffix(".json.part")
        part_file.write_text(json.dumps(pointer), encoding="utf-8")
        os.replace(part_file, _pointer(settings))
        _drop_old(home, keep=target)
    return pointer


def published(settings: Settings) -> dict[str, str] | None:
    """What the pointer says, or None before the first publish."""
    try:
        value: dict[str, str] = json.loads(_pointer(settings).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return value


def published_path(settings: Settings) -> Path:
    """The folder of the published index. Raises NotFoundError before the first publish."""
    pointer = published(settings)
    if pointer is None:
        raise NotFoundError(
            "No index has been published yet.",
            where=str(_pointer(settings)),
            next="materialize `published_index`, or run `make demo`",
        )
    return settings.state_dir / pointer["path"]


def _pointer(settings: Settings) -> Path:
    return settings.state_dir / "published_index.json"


def _drop_old(home: Path, keep: Path) -> None:
    folders = [item for item in home.iterdir() if item.is_dir() and item != keep]
    folders.sort(key=lambda item: item.stat().st_mtime, reverse=True)
    for item in folders[KEEP - 1 :]:
        shutil.rmtree(item, ignore_errors=True)
