"""Shards that earlier builds made, to be brought up to date instead of being built from nothing.

In: the digests of the points that an index shall hold. Out: a copy of the shard that the last build
with the same recipe left, and which points it holds. Under the cache's folder:

    <recipe>/shard/        qdrant-edge's files
    <recipe>/points.bin    (digest, id) of every point in it
    <recipe>/entry.json    points changed since it was built from nothing; checksums of all files

The recipe is everything but the points that a shard follows from: this code, the engine's version
and its configuration. An entry is renamed into place when it is whole; whoever takes or keeps one
holds the cache's lock, so two builds at once each get a whole one and the later stays. The copy
that was taken is compared with the checksums: a damaged entry is none. Entries are as large as the
index; the two that were used last stay (a change of params and the way back).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from resources.index.files import copy_tree

KEEP = 2
_POINT = struct.Struct("<32sI")
_SHARD, _POINTS, _ENTRY = "shard", "points.bin", "entry.json"


@dataclass(frozen=True)
class Earlier:
    """What the shard of an earlier build holds."""

    ids: dict[bytes, int]  # of each point, by its digest
    changed: int  # points added or removed since the shard was built from nothing


class ShardCache:
    """The shards of earlier builds in ``folder``. ``reused``: the last build went on from one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused = False

    def take(self, recipe: str, target: Path) -> Earlier | None:
        """Copy the entry's shard into the folder ``target``; None where there is no whole one."""
        entry = self.folder / recipe
        with self._locked():
            try:
                known = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
                points = (entry / _POINTS).read_bytes()
                found = {"files": copy_tree(entry / _SHARD, target), "points": zlib.crc32(points)}
                os.utime(entry)  # used last
                if found != {name: known[name] for name in found}:
                    return None
                earlier = Earlier(dict(_POINT.iter_unpack(points)), int(known["changed"]))
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return earlier

    def keep(
        self, recipe: str, shard: Path, points: Iterable[tuple[bytes, int]], changed: int
    ) -> None:
        """Make a finished shard the entry of this recipe, in place of an earlier one."""
        data = b"".join(_POINT.pack(*point) for point in points)
        with self._locked():
            part = Path(tempfile.mkdtemp(dir=self.folder, suffix=".part"))
            files = copy_tree(shard, part / _SHARD)
            (part / _POINTS).write_bytes(data)
            value = {"changed": changed, "files": files, "points": zlib.crc32(data)}
            (part / _ENTRY).write_text(json.dumps(value), encoding="utf-8")
            self._drop(recipe)
            part.rename(self.folder / recipe)
            entries = [item for item in self.folder.iterdir() if item.is_dir()]
            entries.sort(key=lambda item: item.stat().st_mtime_ns)
            for old in entries[:-KEEP]:
                self._drop(old.name)

    def clear(self) -> None:
        """Remove every entry: the next build is one from nothing."""
        with self._locked():
            for item in [item for item in self.folder.iterdir() if item.is_dir()]:
                self._drop(item.name)

    def _drop(self, recipe: str) -> None:
        entry = self.folder / recipe
        if entry.exists():  # renamed first: a killed removal leaves no half entry
            shutil.rmtree(entry.rename(entry.with_suffix(".gone")))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One build at a time; what a dead one left half-done goes first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for pattern in ("*.part", "*.gone"):
                for item in self.folder.glob(pattern):
                    shutil.rmtree(item, ignore_errors=True)
            yield
