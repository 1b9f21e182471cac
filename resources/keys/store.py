"""Where virtual keys live: made, listed, rotated, revoked; and what changed, for who caches them.

Two tables. ``ratchet_keys`` has a row a key: its record as JSON and the digests of its tokens.
``ratchet_key_store`` has one row: an ``epoch`` that names this very database, and a ``version``
that every write raises in its own transaction. Writes therefore have an order, and a reader that
remembers (epoch, version) asks for what came after. Rows are never deleted: a revoked key's id
stays taken.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from contracts.errors import ConfigError, InputError, NotFoundError, ServiceError
from contracts.settings import Settings
from resources.database import Database, Postgres, Run, Sqlite
from resources.keys.records import Key
from resources.keys.secret import digest, fingerprint, is_id, load_pepper, new_id, new_token

log = logging.getLogger("ratchet.keys")
SQLITE_FILE = "keys.db"
WHAT = "The keys"
#: A leaked secret should not live on for longer than this.
MAX_GRACE = 30 * 86_400.0
_TABLES = (
    """CREATE TABLE IF NOT EXISTS ratchet_key_store (one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch TEXT NOT NULL, version BIGINT NOT NULL, fingerprint TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS ratchet_keys (id TEXT PRIMARY KEY, version BIGINT NOT NULL,
    record TEXT NOT NULL, digest TEXT NOT NULL, old_digest TEXT, old_until DOUBLE PRECISION)""",
    "CREATE INDEX IF NOT EXISTS ratchet_keys_version ON ratchet_keys (version)",
)
_ADVISORY_LOCK = 5_724_401_733  # CREATE IF NOT EXISTS still races in Postgres


@dataclass(frozen=True)
class StoredKey:
    """A key and what its tokens are compared with: 32-byte digests."""

    key: Key
    digest: bytes
    old_digest: bytes | None = None  # of the token before the last rotation
    old_until: float = 0.0  # Unix seconds; the old token counts before it


@dataclass(frozen=True)
class Issued:
    """A key and its token, which nobody can show a second time."""

    key: Key
    token: str = field(repr=False)


Cursor = tuple[str, int]


@dataclass(frozen=True)
class Changes:
    """Keys written after a cursor. None: a row that cannot be read, so a key that is refused."""

    cursor: Cursor
    whole: bool  # these are all keys, not additions
    keys: dict[str, StoredKey | None]


class KeyStore:
    """Keys in one database.

    Args:
        database: where; its tables are made if they are missing.
        pepper: the HMAC key, see resources/keys/secret.py.

    Raises ConfigError when the database's keys were made with another pepper, ServiceError when it
    does not answer; every method may raise the latter.
    """

    def __init__(self, database: Database, pepper: bytes) -> None:
        self._database, self.pepper = database, pepper
        self._ready = False

    @classmethod
    def open(cls, settings: Settings) -> KeyStore:
        """Postgres when there is an address, else SQLite in the state folder. Connects to nothing
        yet: a gateway must start while its database is down."""
        database: Database = (
            Postgres(settings.postgres_url, WHAT)
            if settings.postgres_url
            else Sqlite(settings.state_dir / SQLITE_FILE, WHAT)
        )
        return cls(database, load_pepper(settings))

    def close(self) -> None:
        self._database.close()

    def create(self, tenant: str, name: str, **policy: Any) -> Issued:
        """Make a key; ``policy`` are fields of Key. Raises InputError naming every bad value."""
        try:
            key = Key(id=new_id(), tenant=tenant, name=name, created=time.time(), **policy)
        except ValidationError as error:
            raise InputError(
                "The key cannot be made.",
                offenders=[
                    f"{'.'.join(map(str, item['loc'])) or 'key'}: {item['msg']}"
                    for item in error.errors()
                ],
            ) from None
        if not key.usable(time.time()):
            raise InputError("The key would have expired already.", next="give a later time")
        token = new_token(key.id)
        with self._transaction() as run:
            run(
                "INSERT INTO ratchet_keys (id, version, record, digest) VALUES (?, ?, ?, ?)",
                key.id,
                self._next_version(run),
                key.model_dump_json(),
                digest(self.pepper, token.encode()).hex(),
            )
        return Issued(key, token)

    def list(self) -> list[Key]:
        """Every key, revoked ones too, oldest first."""
        found = [stored.key for stored in self.changes(None).keys.values() if stored]
        return sorted(found, key=lambda key: (key.created, key.id))

    def rotate(self, key_id: str, grace: float = 0.0) -> Issued:
        """A new token for the same key. The old one counts for ``grace`` seconds more; one that
        was already in its grace ends now. Raises InputError for revoked and expired keys."""
        if not 0 <= grace <= MAX_GRACE:
            raise InputError(f"The grace period must lie between 0 s and {MAX_GRACE:g} s.")
        token, now = new_token(key_id), time.time()
        with self._transaction() as run:
            version = self._next_version(run)
            stored = self._get(run, key_id)
            if not stored.key.usable(now):
                raise InputError(
                    f"Key {key_id} is revoked or expired and gets no new token.",
                    next="make a new key: ratchet keys create",
                )
            run(
                "UPDATE ratchet_keys SET version = ?, digest = ?, old_digest = ?, old_until = ?"
                " WHERE id = ?",
                version,
                digest(self.pepper, token.encode()).hex(),
                stored.digest.hex() if grace else None,
                now + grace if grace else None,
                key_id,
            )
        return Issued(stored.key, token)

    def revoke(self, key_id: str) -> Key:
        """End a key and all its tokens for good. A second time changes nothing."""
        with self._transaction() as run:
            version = self._next_version(run)
            key = self._get(run, key_id).key
            if key.revoked_at is None:
                key = key.model_copy(update={"revoked_at": time.time()})
                run(
                    "UPDATE ratchet_keys SET version = ?, record = ?, old_digest = NULL,"
                    " old_until = NULL WHERE id = ?",
                    version,
                    key.model_dump_json(),
                    key_id,
                )
        return key

    def changes(self, since: Cursor | None) -> Changes:
        """What was written after ``since``, or everything: for None, and for the cursor of another
        database or of a later state of this one (a backup was put back)."""
        with self._transaction() as run:
            epoch, version = self._state(run)
            whole = since is None or since[0] != epoch or since[1] > version
            rows = run(
                "SELECT id, record, digest, old_digest, old_until FROM ratchet_keys"
                " WHERE version > ?",
                -1 if whole or since is None else since[1],
            )
        return Changes((epoch, version), whole, {row[0]: _parse(row) for row in rows})

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Run]:
        """One transaction. After a failure the tables are looked for again: it may have been the
        commit that made them."""
        try:
            with self._database.transaction() as run:
                yield run
        except ServiceError:
            self._ready = False
            raise

    def _get(self, run: Run, key_id: str) -> StoredKey:
        rows = (
            run(
                "SELECT id, record, digest, old_digest, old_until FROM ratchet_keys WHERE id = ?",
                key_id,
            )
            if is_id(key_id)
            else []
        )
        stored = _parse(rows[0]) if rows else None
        if stored is None:
            raise NotFoundError(
                f"There is no key {key_id[:40]!r}.",
                where=self._database.where,
                next="ratchet keys list shows the ids; a token is rk_<id>.<secret>",
            )
        return stored

    def _next_version(self, run: Run) -> int:
        """Raise the version. The row's lock puts writers in a queue until they commit."""
        self._state(run)
        run("UPDATE ratchet_key_store SET version = version + 1")
        return int(run("SELECT version FROM ratchet_key_store")[0][0])

    def _state(self, run: Run) -> Cursor:
        """(epoch, version); makes the tables in a database that has none."""
        if not self._ready:
            if isinstance(self._database, Postgres):
                run("SELECT pg_advisory_xact_lock(?)", _ADVISORY_LOCK)
            for statement in _TABLES:
                run(statement)
            run(
                "INSERT INTO ratchet_key_store (one, epoch, version, fingerprint)"
                " VALUES (1, ?, 0, ?) ON CONFLICT (one) DO NOTHING",
                secrets.token_hex(8),
                fingerprint(self.pepper),
            )
        rows = run("SELECT epoch, version, fingerprint FROM ratchet_key_store")
        if rows[0][2] != fingerprint(self.pepper):
            raise ConfigError(
                "The keys in this database were made with another secret: none would be accepted.",
                where=self._database.where,
                next="set RATCHET_KEYS_SECRET as where the keys were made (without it, the file"
                " keys.secret in the state folder of that machine)",
            )
        self._ready = True
        return str(rows[0][0]), int(rows[0][1])


def _parse(row: tuple[Any, ...]) -> StoredKey | None:
    """A row as StoredKey; None when a newer version of this code, or a hand, wrote it."""
    key_id, record, current, old, until = row
    try:
        key = Key.model_validate_json(record)
        if key.id != key_id:
            raise ValueError("the record names another id")
        return StoredKey(
            key,
            bytes.fromhex(current),
            bytes.fromhex(old) if old else None,
            float(until or 0),
        )
    except ValueError as error:
        log.error("key %s cannot be read and is refused: %s", key_id, str(error).splitlines()[0])
        return None
