"""Bytes by the hash of what they were made from: a content-addressed cache on disk.

In: SHA-256 keys. Out: the bytes that were stored under them. One SQLite file a recipe (a model, a
splitter with its settings), in write-ahead mode: several processes may read and write it at once,
and a killed one loses only its last uncommitted batch. Each row carries its CRC; a row that does
not check is treated as absent and is written anew. A file that is no database is moved aside.

Whoever uses it puts into the file's name, or into the key, everything that the value follows from:
a cache never has to be invalidated, only deleted when it is too large.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries "
    "(sha BLOB PRIMARY KEY, crc INTEGER NOT NULL, value BLOB NOT NULL)"
)
_GET = "SELECT sha, crc, value FROM entries WHERE sha IN ({})"
_LOOKUP = 500  # keys a query: SQLite's safe limit of variables is 999


class ContentCache:
    """A file of byte strings by key. Keys are SHA-256 in hex."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # one connection, used by any thread
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # locked, disk full, read-only: not a corrupt file
            self._set_aside()
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(_SCHEMA)
            db.commit()
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _set_aside(self) -> None:
        """Move a damaged file out of the way; its entries are computed again."""
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            self.path.replace(self.path.with_name(self.path.name + ".corrupt"))
        for ending in ("-wal", "-shm"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Values of those keys that are present and whole."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _LOOKUP):
            part = [bytes.fromhex(key) for key in keys[start : start + _LOOKUP]]
            for sha, crc, value in self._rows(_GET.format(",".join("?" * len(part))), part):
                if zlib.crc32(sha + value) == crc:
                    found[sha.hex()] = value
        return found

    def _rows(self, query: str, values: list[bytes]) -> list[tuple[bytes, int, bytes]]:
        """Rows of a query; a file that turns out damaged is set aside and counts as empty."""
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._db.close()
                self._set_aside()
                self._db = self._connect()
                return []

    def put(self, values: Mapping[str, bytes]) -> None:
        """Store values under their keys, all or none of them."""
        rows = []
        for key, value in values.items():
            sha = bytes.fromhex(key)
            rows.append((sha, zlib.crc32(sha + value), value))
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._db.close()
