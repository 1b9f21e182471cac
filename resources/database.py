"""The two databases that keys and the ledger may live in, behind one door: run SQL in one
transaction.

Every failure of a database becomes a ServiceError; the next call connects anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from contracts.errors import ServiceError

#: Seconds: a database that needs longer counts as down.
CONNECT_SECONDS = 3
STATEMENT_SECONDS = 3.0
LOCK_SECONDS = 2.0


class Run(Protocol):
    """Run one statement with ``?`` for values; give its rows, none if it has none."""

    def __call__(self, sql: str, *values: object) -> list[tuple[Any, ...]]: ...


class Database(Protocol):
    where: str  # for people; without a password

    def transaction(self) -> contextlib.AbstractContextManager[Run]:
        """One read-write transaction. Raises ServiceError."""

    def close(self) -> None: ...


class Sqlite:
    """A file of mode 0600. It is opened for every transaction (0.1 ms), so that a file that was
    removed or replaced is noticed, and no thread owns a connection.

    Args:
        path: made with its folder where it does not exist.
        what: what is stored in it, for messages.
        wait: s that a transaction waits for another writer.
    """

    def __init__(self, path: Path, what: str, wait: float = STATEMENT_SECONDS) -> None:
        self.path, self.where = path, str(path)
        self._what, self._wait = what, wait
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ServiceError(f"{what} cannot be stored: {error}", where=self.where) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Run]:
        try:
            with contextlib.closing(
                sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode=rw",
                    uri=True,
                    timeout=self._wait,
                    isolation_level=None,
                )
            ) as connection:
                connection.execute("BEGIN IMMEDIATE")

                def run(sql: str, *values: object) -> list[tuple[Any, ...]]:
                    return connection.execute(sql, values).fetchall()

                yield run
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ServiceError(
                f"{self._what} cannot be read or written: {error}", where=self.where
            ) from None

    def close(self) -> None:
        pass


class Postgres:
    """One connection, used by one thread at a time, made anew after every failure.

    Args:
        url: postgres:// or postgresql://, a driver in its scheme is ignored.
        what: what is stored in it, for messages.
        wait: s that a statement waits for another writer; it may take a second longer in all.
    """

    def __init__(self, url: str, what: str, wait: float = LOCK_SECONDS) -> None:
        self._what, self._wait = what, wait
        self._url = re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", url)
        self.where = re.sub(r"//[^@/]*@", "//", self._url).partition("?")[0]
        self._connection: Any = None

    def _connect(self) -> Any:
        import psycopg2

        if self._connection is None or self._connection.closed:
            self._connection = psycopg2.connect(
                self._url,
                connect_timeout=CONNECT_SECONDS,
                options=f"-c statement_timeout={self._wait + 1:g}s -c lock_timeout={self._wait:g}s",
                tcp_user_timeout=int(STATEMENT_SECONDS * 1000),  # a host that is gone
                application_name="ratchet",
            )
        return self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Run]:
        import psycopg2

        try:
            with self._connect() as connection, connection.cursor() as cursor:

                def run(sql: str, *values: object) -> list[tuple[Any, ...]]:
                    cursor.execute(sql.replace("?", "%s"), values)
                    return cursor.fetchall() if cursor.description else []

                yield run
        except psycopg2.Error as error:
            self.close()
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ServiceError(
                f"{self._what} cannot be read or written: {said[0]}",
                where=self.where,
                next="is Postgres up, and does POSTGRES_URL name it?",
            ) from None

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None
