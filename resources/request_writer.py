"""Writes the request log; ``resources.requests`` says how it lies on the disk, and reads it.

In: rows with the fields of RequestRecord, from the gateway's thread. Out: journals, and Parquet
files made of them. A writer holds a lock on its journal, so a journal without a lock is one whose
writer has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from resources.requests import parquet_of, table_of


class DayWriter:
    """Appends rows to the journal of the current file and rolls it into Parquet.

    For one thread. ``append`` makes rows readable at once; ``tend`` rolls the file when it has been
    idle or grown old; ``close`` rolls what is left. OSError (a full disk) passes to the caller with
    nothing half-written: the journal keeps its whole lines.

    Args:
        folder: ``Settings.requests_dir``.
        idle_s: roll after this long without a row.
        age_s: roll after this long at the latest. Under steady traffic a day has 2,880 files.
        rows: roll at this many rows.

    Attributes:
        written: rows that are in files, since the beginning.
    """

    def __init__(
        self, folder: Path, *, idle_s: float = 2.0, age_s: float = 30.0, rows: int = 5000
    ) -> None:
        self.folder, self.idle_s, self.age_s, self.rows = folder, idle_s, age_s, rows
        self.written = 0
        self._journal: Path | None = None
        self._handle = -1
        self._day, self._count, self._opened, self._touched, self._number = "", 0, 0.0, 0.0, 0

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows to the journal of their day, as many at once as belong into one file. After an
        error ``written`` says how many of them are in the files."""
        done = 0
        while done < len(rows):
            day = rows[done]["time"][:10]
            if day != self._day or self._count >= self.rows:
                self.roll()
            if self._journal is None:
                self._open(day)
            several: list[bytes] = []
            for row in rows[done : done + self.rows - self._count]:
                if row["time"][:10] != day:
                    break
                several.append(_line(row))
            _write_whole(self._handle, b"".join(several))
            done += len(several)
            self._count += len(several)
            self.written += len(several)
            self._touched = time.monotonic()

    def tend(self) -> None:
        """Roll the file if it is due."""
        now = time.monotonic()
        if self._journal is not None and (
            now - self._touched >= self.idle_s or now - self._opened >= self.age_s
        ):
            self.roll()

    def roll(self) -> None:
        """Turn the journal into a Parquet file. A failure leaves the journal, which is readable."""
        if self._journal is None:
            return
        try:
            _convert(self._journal)
        finally:
            os.close(self._handle)
            self._journal, self._handle, self._day = None, -1, ""

    def close(self) -> None:
        """Roll what is left."""
        self.roll()

    def _open(self, day: str) -> None:
        home = self.folder / day
        self.folder.mkdir(parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)  # full texts: not for other users of the machine
        stem = f"{datetime.now(UTC):%H%M%S%f}-{os.getpid()}-{self._number}"
        self._number += 1
        path = home / f".{stem}.jsonl"
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._journal, self._day, self._count = path, day, 0
        self._opened = self._touched = time.monotonic()


def recover(folder: Path) -> int:
    """Turn the journals of dead writers into Parquet; return how many. Called at gateway start."""
    done = 0
    for journal in sorted(folder.glob("[0-9]*/.*.jsonl")):
        with contextlib.suppress(OSError), journal.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its writer lives
            _convert(journal)
            done += 1
    for part in folder.glob("[0-9]*/.*.part"):  # a writer died between writing and renaming
        if time.time() - part.stat().st_mtime > 600:
            part.unlink(missing_ok=True)
    return done


def _convert(journal: Path) -> None:
    """Journal to Parquet: temporary file, rename, then the journal goes."""
    table = table_of(journal)
    if table.num_rows:
        part = journal.with_suffix(".part")
        try:
            pq.write_table(table, part, compression="zstd")
            part.replace(parquet_of(journal))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    journal.unlink()


def _line(row: dict[str, Any]) -> bytes:
    """A journal's line."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)  # 2 us; json.dumps takes 25
    except TypeError:  # half a character
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _write_whole(handle: int, lines: bytes) -> None:
    """Append the lines or leave the file as it was: a full disk can take half a write."""
    before = os.fstat(handle).st_size
    try:
        written = os.write(handle, lines)
        if written < len(lines):
            raise OSError(28, "No space left on device")
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, before)
        raise
