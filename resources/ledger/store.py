"""The ledger itself: append, read, verify. SQLite in the state folder, or Postgres by address.

Rows are never changed. An append runs in one transaction under the database's own lock, so that
rows of many processes and machines form one chain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from pydantic import ValidationError

from contracts.errors import ConflictError, InputError, ServiceError
from contracts.settings import Settings
from resources.database import Database, Postgres, Run, Sqlite
from resources.ledger import chain, history, tables
from resources.ledger.actor import actor as current_actor
from resources.ledger.entry import ANSWERS, CHANGES, GENESIS, Entry, Head, Kind, canonical
from resources.ledger.head import HeadFile

log = logging.getLogger("ratchet.ledger")
SQLITE_FILE = "ledger.db"
HEAD_FILE = "ledger.head"
WHAT = "The ledger"
#: s an append waits for others: 16 processes that append at once wait for less than one.
WAIT_SECONDS = 30.0
_SELECT = f"SELECT {', '.join(tables.COLUMNS)} FROM {tables.TABLE}"


class Ledger:
    """The rows of one database.

    Args:
        database: where; the table is made at the first append.
        head: the file that notes the newest row on this machine.

    Every method may raise ServiceError: the database does not answer.
    """

    def __init__(self, database: Database, head: HeadFile) -> None:
        self._database, self._head_file = database, head
        self._exists = False

    @classmethod
    def open(cls, settings: Settings) -> Ledger:
        """Postgres when there is an address (``POSTGRES_URL``), else ``<state>/ledger.db``.
        Connects to nothing yet."""
        database: Database = (
            Postgres(settings.postgres_url, WHAT, WAIT_SECONDS)
            if settings.postgres_url
            else Sqlite(settings.state_dir / SQLITE_FILE, WHAT, WAIT_SECONDS)
        )
        return cls(database, HeadFile(settings.state_dir / HEAD_FILE))

    @property
    def where(self) -> str:
        """File or address, for people; without a password."""
        return self._database.where

    def close(self) -> None:
        self._database.close()

    # -- write -------------------------------------------------------------------------------

    def append(
        self,
        kind: Kind,
        *,
        channel: str = "",
        release: str = "",
        actor: str | None = None,
        reason: str = "",
        body: dict[str, Any] | None = None,
        after: int | None = None,
        once: bool = False,
    ) -> Entry:
        """Add the next row. When this returns, the row is on disk.

        Args:
            kind: what happened.
            channel, release: to what; "" for neither.
            actor: who; None: :func:`resources.ledger.actor`.
            reason: why, in their words.
            body: what the kind has to say besides, JSON. A change (``CHANGES``) needs
                ``body["channel"]``: the pointer as it is to be, ``Channel.model_dump()``. An
                answer (``approved``, ``refused``) needs ``body["request"]``: the seq of the
                ``requested`` row.
            after: for a change: seq of the channel's last change as the caller saw it
                (:meth:`last`), None when there was none. Other kinds ignore it.
            once: give the row of the same kind, channel, release and body, if there is one.

        Raises:
            ConflictError: another change came in between, or the request has its answer already;
                ``winner`` is that Entry, and the message names who, what and when.
            InputError: the row makes no sense, or the ledger lost rows that it had.
        """
        who = " ".join((current_actor() if actor is None else actor).split())
        body, text = _body(kind, body or {})
        _check_fields(kind, channel, release, who, reason)
        with self._database.transaction() as run:
            self._make_table(run)
            last = self._last_row(run)
            self._check_head(run, last)
            if once:
                same = self._rows(
                    run,
                    "WHERE kind = ? AND channel = ? AND release = ? AND body = ? ORDER BY seq",
                    kind, channel, release, text,
                )  # fmt: skip
                if same:
                    return same[0]
            if kind in CHANGES:
                self._check_after(run, channel, after)
            if kind in ANSWERS:
                self._check_request(run, kind, release, body["request"])
            entry = _next_entry(
                last, kind=kind, channel=channel, release=release, actor=who, reason=reason,
                body=body,
            )  # fmt: skip
            row = entry.model_dump()
            run(
                f"INSERT INTO {tables.TABLE} ({', '.join(tables.COLUMNS)}) VALUES "
                f"({', '.join('?' for _ in tables.COLUMNS)})",
                *(text if name == "body" else row[name] for name in tables.COLUMNS),
            )
        try:
            self._head_file.note(entry.head)
        except (
            ServiceError
        ) as error:  # the row stands: who asked for it must not hear that it failed
            log.warning("%s", error)
        return entry

    # -- read --------------------------------------------------------------------------------

    def entries(
        self,
        *,
        channel: str | None = None,
        release: str | None = None,
        kinds: Sequence[Kind] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> list[Entry]:
        """Rows in order, oldest first; every argument narrows them.

        Args:
            channel, release: of exactly this one.
            kinds: of one of these; (): of any.
            since, until: not before, not after this time (by the clock of who wrote them); aware.
            limit: only the newest so many.
        """
        where, values = [], []
        for name, value in (("channel", channel), ("release", release)):
            if value is not None:
                where.append(f"{name} = ?")
                values.append(value)
        if kinds:
            where.append(f"kind IN ({', '.join('?' for _ in kinds)})")
            values += kinds
        for sign, time in ((">=", since), ("<=", until)):
            if time is not None:
                where.append(f"time {sign} ?")
                values.append(history.stamp(time))
        text = f"WHERE {' AND '.join(where)} " if where else ""
        text += "ORDER BY seq DESC" + (f" LIMIT {int(limit)}" if limit is not None else "")
        with self._database.transaction() as run:
            return self._rows(run, text, *values)[::-1] if self._has_table(run) else []

    def get(self, seq: int) -> Entry | None:
        """The row of that number."""
        with self._database.transaction() as run:
            found = self._rows(run, "WHERE seq = ?", seq) if self._has_table(run) else []
        return found[0] if found else None

    def last(self, channel: str) -> Entry | None:
        """The channel's last change: what it serves is that row's ``pointer``."""
        found = self.entries(channel=channel, kinds=CHANGES, limit=1)
        return found[0] if found else None

    def channels(self) -> dict[str, Entry]:
        """The last change of every channel that ever had one, by name."""
        marks = ", ".join("?" for _ in CHANGES)
        newest = f"SELECT MAX(seq) FROM {tables.TABLE} WHERE kind IN ({marks}) GROUP BY channel"
        with self._database.transaction() as run:
            if not self._has_table(run):
                return {}
            found = self._rows(run, f"WHERE seq IN ({newest}) ORDER BY channel", *CHANGES)
        return {entry.channel: entry for entry in found}

    def at(self, time: datetime) -> dict[str, history.Served]:
        """What each channel served at that time, who let it in and who had approved it.

        Args:
            time: aware.
        """
        return history.at(self.entries(kinds=(*CHANGES, "approved"), until=time))

    def head(self) -> Head | None:
        """The newest row, to be noted elsewhere; None for an empty ledger."""
        with self._database.transaction() as run:
            last = self._last_row(run) if self._has_table(run) else None
        return last.head if last else None

    def verify(self, head: Head | None = None) -> list[str]:
        """What is wrong, one sentence each; [] when every row is as it was written.

        Found are rows that were altered, removed, reordered or put in between, and a tail that was
        cut off: against the head file and against ``head``, which somebody noted elsewhere. A
        ledger without a fault also brings the head file forward.
        """
        with self._database.transaction() as run:
            rows = run(f"{_SELECT} ORDER BY seq") if self._has_table(run) else []
        problems = chain.check(rows)
        noted: list[tuple[str, Head]] = [("the head given", head)] if head else []
        try:
            if (ours := self._head_file.read()) is not None:
                noted.append((f"the head in {self._head_file.path}", ours))
            elif len(rows) > 1 and head is None:  # one row: killed before the file was there
                problems.append(
                    f"{self._head_file.path} is missing, so a cut-off end would not be seen: give "
                    "a head that was noted elsewhere (--head SEQ:HASH), which also writes the file"
                )
        except InputError as error:
            problems.append(f"{self._head_file.path}: {error.what}")
        problems += chain.check_heads(rows, noted)
        if rows and not problems:
            self._head_file.note(Head(int(rows[-1][0]), str(rows[-1][-1])))
        return problems

    # -- inside ------------------------------------------------------------------------------

    def _has_table(self, run: Run) -> bool:
        if not self._exists:
            postgres = isinstance(self._database, Postgres)
            sql = tables.EXISTS_POSTGRES if postgres else tables.EXISTS_SQLITE
            self._exists = bool(run(sql, tables.TABLE))
        return self._exists

    def _make_table(self, run: Run) -> None:
        """The table, its guard, and the lock under which the next number is taken."""
        postgres = isinstance(self._database, Postgres)
        if postgres:  # SQLite's transaction holds the only write lock already
            run("SELECT pg_advisory_xact_lock(?)", tables.ADVISORY_LOCK)
        if not self._has_table(run):
            for statement in tables.POSTGRES if postgres else tables.SQLITE:
                run(statement)

    def _rows(self, run: Run, where: str, *values: object) -> list[Entry]:
        return [_entry(row) for row in run(f"{_SELECT} {where}", *values)]

    def _last_row(self, run: Run) -> Entry | None:
        found = self._rows(run, "ORDER BY seq DESC LIMIT 1")
        return found[0] if found else None

    def _check_head(self, run: Run, last: Entry | None) -> None:
        """Refuse to go on from a ledger that has lost rows which this machine saw."""
        noted = self._head_file.read()
        if noted is None or run(
            f"SELECT 1 FROM {tables.TABLE} WHERE seq = ? AND hash = ?", noted.seq, noted.hash
        ):
            return
        raise InputError(
            f"The ledger is not the one that this machine wrote to: row {noted.seq} is "
            f"{'another one' if last and last.seq >= noted.seq else 'missing'}, and the newest "
            f"one here is {last.seq if last else 'none'}.",
            where=f"{self.where}, {self._head_file.path}",
            next="put the newest backup of the ledger back; docs/ledger.md, 'When it is lost'",
        )

    def _check_after(self, run: Run, channel: str, after: int | None) -> None:
        marks = ", ".join("?" for _ in CHANGES)
        found = self._rows(
            run,
            f"WHERE channel = ? AND kind IN ({marks}) ORDER BY seq DESC LIMIT 1",
            channel,
            *CHANGES,
        )
        last = found[0] if found else None
        if (last.seq if last else None) == after:
            return
        if last is None:
            raise InputError(f"The ledger has no row {after} of channel {channel}.")
        raise ConflictError(
            f"Channel {channel} was changed meanwhile: {last}"
            f"{f' ({last.reason})' if last.reason else ''}.",
            winner=last,
            next="look at what it serves now (ratchet status), and decide again",
        )

    def _check_request(self, run: Run, kind: Kind, release: str, request: int) -> None:
        asked = self._rows(run, "WHERE seq = ? AND kind = 'requested'", request)
        if not asked or asked[0].release != release:
            raise InputError(f"Row {request} of the ledger is no request for release {release}.")
        marks = ", ".join("?" for _ in ANSWERS)
        for other in self._rows(run, f"WHERE kind IN ({marks}) AND seq > ?", *ANSWERS, request):
            if other.body.get("request") == request:
                raise ConflictError(
                    f"This request has its answer already: {other}.",
                    winner=other,
                    next="ask anew, if it is to be decided again",
                )


def _body(kind: Kind, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The body as it will be read, and as it is stored. Raises InputError for what cannot be."""
    try:
        body: dict[str, Any] = json.loads(canonical(given))
        text = canonical(body)
        text.encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"The body of a ledger row is not JSON: {error}") from None
    if kind in CHANGES and not isinstance(body.get("channel"), dict):
        raise InputError(f"A row of kind {kind} needs body['channel'], the pointer as it is to be.")
    if kind in ANSWERS and type(body.get("request")) is not int:
        raise InputError(f"A row of kind {kind} needs body['request'], the row that it answers.")
    return body, text


def _check_fields(kind: Kind, channel: str, release: str, who: str, reason: str) -> None:
    """Raise InputError naming every field that cannot be."""
    wrong = [] if kind in get_args(Kind) else [f"kind: {kind!r} is none"]
    if kind in CHANGES and not channel:
        wrong.append("channel: missing")
    if kind in (*CHANGES, *ANSWERS, "requested", "verdict") and not release:
        wrong.append("release: missing")
    if not who:
        wrong.append("actor: missing")
    fields = {"channel": channel, "release": release, "actor": who, "reason": reason}
    for name, value in fields.items():  # NUL: Postgres has none; half a character: neither has
        if "\0" in value or value.encode(errors="replace").decode() != value:
            wrong.append(f"{name}: holds what is no text")
    if wrong:
        raise InputError("This cannot be a row of the ledger.", offenders=wrong)


def _next_entry(last: Entry | None, **fields: Any) -> Entry:
    values = {
        "seq": last.seq + 1 if last else 1,
        "time": history.stamp(datetime.now(UTC)),
        "prev": last.hash if last else GENESIS,
        **fields,
    }
    return Entry(**values, hash=Entry(**values, hash="").computed())


def _entry(row: tuple[Any, ...]) -> Entry:
    """A row as Entry. Raises ServiceError for one that no append can have written."""
    try:
        return chain.parse(row)
    except (ValidationError, ValueError) as error:
        raise ServiceError(
            f"Row {row[0]} of the ledger cannot be read: {str(error).splitlines()[0]}",
            next="ratchet ledger verify",
        ) from None
