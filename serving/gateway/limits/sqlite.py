"""Limits of several workers on one machine: one SQLite transaction a decision, off the loop.

An account is a row of JSON, see StoredAccount; the arithmetic is account.py's. Windows run on the
machine's monotonic clock, which all its processes share; days on its Unix time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from serving.gateway.limits.account import Calendar, Refusal, StoredAccount
from serving.gateway.limits.config import Limits
from serving.gateway.limits.shared import (
    Accounts,
    Granted,
    Settlement,
    SharedLimiter,
    StoreDown,
)
from serving.gateway.metrics import Metrics

T = TypeVar("T")
#: Rows of sessions that nobody wrote to for that long are removed.
SESSION_IDLE_SECONDS = 2 * 86_400.0


class SqliteLimiter(SharedLimiter):
    """See SharedLimiter. ``path``: a file of mode 0600 on a local disk."""

    def __init__(self, config: Limits, metrics: Metrics, path: Path) -> None:
        super().__init__(config, metrics)
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "limits-sqlite")
        self._calendar = Calendar()

    async def _reserve(
        self, name: str, accounts: Accounts, tokens: int, money: int
    ) -> Granted | Refusal:
        return await self._call(lambda: self._decide(name, accounts, tokens, money))

    async def _settle(self, batch: list[Settlement]) -> None:
        await self._call(lambda: self._apply(batch))

    async def _renew(self, leases: dict[str, Accounts]) -> None:
        await self._call(lambda: self._extend(leases))

    async def _probe(self) -> None:
        await self._call(self._begin)

    async def _disconnect(self) -> None:
        self._thread.submit(self._close)
        await asyncio.to_thread(self._thread.shutdown)

    async def _call(self, work: Callable[[], T]) -> T:
        """Run in the one thread that owns the connection. One that hangs is waited for by those
        behind it, and by their deadlines."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._thread.submit(self._close)
            raise StoreDown(str(error)) from None

    # -- in the thread --------------------------------------------------------------------------

    def _open_file(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection = sqlite3.connect(
                self._path,
                timeout=self._config.timeout_ms / 1000,
                isolation_level=None,
                check_same_thread=False,
            )
            # Settled and reserved amounts may be lost with the machine, never with a process.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS account"
                " (name TEXT PRIMARY KEY, state TEXT NOT NULL, seen REAL NOT NULL) WITHOUT ROWID"
            )
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._open_file()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _begin(self) -> None:
        """Write something: a disk that is full or read-only is an outage too."""
        with self._transaction() as connection:
            now = time.time()
            connection.execute(
                "DELETE FROM account WHERE name LIKE '%:s:%' AND (seen < ? OR seen > ?)",
                (now - SESSION_IDLE_SECONDS, now + SESSION_IDLE_SECONDS),
            )
            self._save(connection, "probe", StoredAccount.load(None, 60.0, 0.0), 0.0)

    def _load(
        self, connection: sqlite3.Connection, name: str, window: float, now: float
    ) -> StoredAccount:
        row = connection.execute("SELECT state FROM account WHERE name = ?", (name,)).fetchone()
        return StoredAccount.load(json.loads(row[0]) if row else None, window, now)

    def _save(
        self, connection: sqlite3.Connection, name: str, stored: StoredAccount, now: float
    ) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO account (name, state, seen) VALUES (?, ?, ?)",
            (name, json.dumps(stored.dump(now), separators=(",", ":")), time.time()),
        )

    def _decide(self, lease: str, accounts: Accounts, tokens: int, money: int) -> Granted | Refusal:
        with self._transaction() as connection:
            now, wall = time.monotonic(), time.time()  # inside: transactions have an order
            calendar = self._calendar.at(wall)
            loaded = []
            for name, rules in accounts:
                stored = self._load(connection, name, rules.window, now)
                refusal = stored.account.refuse(rules, now, wall, calendar, tokens, money)
                if refusal is not None:
                    return refusal
                loaded.append(stored)
            for (name, _), stored in zip(accounts, loaded, strict=True):
                part = stored.account.take(now, tokens, money)
                expires = now + self._config.lease_seconds
                stored.leases[lease] = [expires, part, tokens, money]
                self._save(connection, name, stored, now)
        first, rules = loaded[0].account, accounts[0][1]
        return Granted(
            (rules.requests or 0) - first.requests.total, (rules.tokens or 0) - first.tokens.total
        )

    def _apply(self, batch: list[Settlement]) -> None:
        with self._transaction() as connection:
            now = time.monotonic()
            calendar = self._calendar.at(time.time())
            for one in batch:
                for name, rules in one.accounts:
                    stored = self._load(connection, name, rules.window, now)
                    held = stored.leases.pop(one.lease, None)
                    if held is None and one.again:
                        continue
                    reserved = None if held is None else (int(held[1]), int(held[2]), int(held[3]))
                    stored.account.settle(now, calendar, reserved, one.tokens, one.money)
                    self._save(connection, name, stored, now)

    def _extend(self, leases: dict[str, Accounts]) -> None:
        with self._transaction() as connection:
            now = time.monotonic()
            by_account: dict[str, tuple[float, list[str]]] = {}
            for lease, accounts in leases.items():
                for name, rules in accounts:
                    by_account.setdefault(name, (rules.window, []))[1].append(lease)
            for name, (window, names) in by_account.items():
                stored = self._load(connection, name, window, now)
                for lease in names:
                    if lease in stored.leases:
                        stored.leases[lease][0] = now + self._config.lease_seconds
                self._save(connection, name, stored, now)
