"""What was spent, on disk: written behind by a thread, read once at the start.

Rows are sums by account and UTC period, and writing adds to them, so several workers may share the
file. A process that is killed loses at most FLUSH_SECONDS of spending; a disk that refuses writes
loses nothing while the process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sqlite3
import threading
import time
from pathlib import Path

log = logging.getLogger("ratchet.gateway.limits")
FLUSH_SECONDS = 0.5
_ADD = (
    "INSERT INTO spend (account, period, nano) VALUES (?, ?, ?)"
    " ON CONFLICT (account, period) DO UPDATE SET nano = nano + excluded.nano"
)


@functools.lru_cache(4)
def day_period(day: int) -> str:
    return f"d{day:06d}"


@functools.lru_cache(4)
def month_period(month: int) -> str:
    return f"m{month:06d}"


class SpendJournal:
    """Billionths by account and period in an SQLite file of mode 0600.

    Args:
        path: the file; made if it is missing.
        flush_seconds: how often the thread writes.
    """

    def __init__(self, path: Path, *, flush_seconds: float = FLUSH_SECONDS) -> None:
        self._path, self._flush_seconds = path, flush_seconds
        self._spent: dict[tuple[str, str], int] = {}
        self._waiting: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="spend-journal", daemon=True)
        self._complained = float("-inf")

    async def start(self) -> None:
        """Read what was spent, then begin to write. A file that cannot be read is logged: budgets
        then begin at what this process sees."""
        try:
            self._spent = await asyncio.to_thread(self._read)
        except (sqlite3.Error, OSError) as error:
            self._complain(error)
        self._thread.start()

    async def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 10)

    def spent(self, account: str, day: int, month: int) -> tuple[int, int]:
        """Billionths that the file held at the start, of that day and that month."""
        return (
            self._spent.get((account, day_period(day)), 0),
            self._spent.get((account, month_period(month)), 0),
        )

    def add(self, account: str, day: int, month: int, nano: int) -> None:
        """Remember spending. Takes a microsecond; the thread writes it."""
        with self._lock:
            for period in (day_period(day), month_period(month)):
                key = (account, period)
                self._waiting[key] = self._waiting.get(key, 0) + nano

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self._path, timeout=5, isolation_level=None)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS spend (account TEXT NOT NULL, period TEXT NOT NULL,"
            " nano INTEGER NOT NULL, PRIMARY KEY (account, period)) WITHOUT ROWID"
        )
        return connection

    def _read(self) -> dict[tuple[str, str], int]:
        """Every sum of this and the last month's days; older days are removed."""
        oldest = day_period(int(time.time() // 86_400) - 62)
        with contextlib.closing(self._open()) as connection:
            connection.execute("DELETE FROM spend WHERE period LIKE 'd%' AND period < ?", (oldest,))
            rows = connection.execute("SELECT account, period, nano FROM spend").fetchall()
        return {(account, period): nano for account, period, nano in rows}

    def _work(self) -> None:
        while not self._stop.wait(self._flush_seconds):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        try:
            with contextlib.closing(self._open()) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(_ADD, [(*key, nano) for key, nano in waiting.items()])
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            with self._lock:
                for key, nano in waiting.items():
                    self._waiting[key] = self._waiting.get(key, 0) + nano
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """At most one line in ten seconds."""
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.error("the journal of spending %s: %s", self._path, error)
