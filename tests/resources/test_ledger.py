"""The ledger: one contract for SQLite and Postgres; every tampering is found; races and kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from contracts.errors import ConflictError, InputError, ServiceError
from contracts.records import Channel
from contracts.settings import Settings
from resources.ledger import Entry, Head, Ledger, actor
from resources.ledger.tables import COLUMNS, TABLE
from tests.servers import postgres_server, postgres_url  # noqa: F401

Open = Callable[[], Ledger]
A, B, C = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Settings of an empty ledger."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    return replace(settings, postgres_url=url)


@pytest.fixture
def ledger(where: Settings) -> Iterator[Ledger]:
    with closing(Ledger.open(where)) as found:
        yield found


def pointer(release: str, channel: str = "stable", previous: str | None = None) -> dict[str, Any]:
    value = Channel(
        name=channel, release=release, engine_url="http://e:1", model="m", previous=previous
    )
    return {"channel": value.model_dump()}


def promote(
    ledger: Ledger, release: str, after: int | None, channel: str = "stable", **more: Any
) -> Entry:
    more.setdefault("actor", "ann")
    return ledger.append(
        "promoted", channel=channel, release=release, after=after, body=pointer(release, channel),
        **more,
    )  # fmt: skip


def raw(where: Settings, *statements: str, guard: bool = False) -> None:
    """SQL behind the ledger's back, as somebody may who owns the database."""
    if where.postgres_url:
        import psycopg2

        connection: Any = psycopg2.connect(where.postgres_url)
        off, on = f"ALTER TABLE {TABLE} DISABLE TRIGGER USER", None
    else:
        connection = sqlite3.connect(where.state_dir / "ledger.db")
        off, on = None, None
    with closing(connection):
        cursor = connection.cursor()
        if not guard and off:
            cursor.execute(off)
        elif not guard:
            names = cursor.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall()
            for (name,) in names:
                cursor.execute(f"DROP TRIGGER {name}")
        assert on is None
        for statement in statements:
            cursor.execute(statement)
        connection.commit()


def test_rows_are_appended_and_read(ledger: Ledger) -> None:
    assert ledger.entries() == [] and ledger.head() is None and ledger.verify() == []
    assert ledger.last("stable") is None and ledger.get(1) is None
    first = ledger.append("verdict", release=A, actor="dagster:1", body={"b": [1, 2.5, None, "é"]})
    second = promote(ledger, A, None, reason="it is better ☎")
    third = promote(ledger, B, None, channel="canary")
    fourth = promote(ledger, B, second.seq)
    assert [e.seq for e in ledger.entries()] == [1, 2, 3, 4]
    assert ledger.get(2) == second and ledger.get(9) is None
    assert [first.prev, second.prev] == ["0" * 64, first.hash]
    assert ledger.entries(channel="stable") == [second, fourth]
    assert ledger.entries(release=B, channel="canary") == [third]
    assert ledger.entries(kinds=["verdict"]) == [first]
    assert ledger.entries(limit=2) == [third, fourth]
    assert ledger.last("stable") == fourth and fourth.pointer is not None
    assert ledger.channels() == {"stable": fourth, "canary": third}
    assert ledger.head() == (4, fourth.hash) and ledger.verify(ledger.head()) == []
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert ledger.entries(since=later) == []
    assert len(ledger.entries(since=later - timedelta(hours=1))) == 4
    assert str(second).startswith(f"row 2, promoted {A} on stable by ann at 20")


def test_a_second_change_loses_and_is_told_to_whom(ledger: Ledger) -> None:
    promote(ledger, A, None)
    with pytest.raises(ConflictError, match=f"row 1, promoted {A} on stable by ann at 20") as error:
        promote(ledger, B, None, actor="bob")
    assert isinstance(error.value.winner, Entry) and error.value.winner.release == A
    promote(ledger, B, 1, reason="why not")
    with pytest.raises(ConflictError, match=r"by ann at .* UTC \(why not\)"):
        promote(ledger, C, 1)
    promote(ledger, C, None, channel="canary")  # another channel
    with pytest.raises(InputError, match="no row 7"):
        promote(ledger, C, 7, channel="other")
    assert len(ledger.entries()) == 3


def test_a_request_is_answered_once(ledger: Ledger) -> None:
    asked = ledger.append("requested", channel="stable", release=A, actor="ann")
    again = ledger.append("requested", channel="stable", release=A, actor="ann")
    for release, row in ((B, asked.seq), (A, 99)):
        with pytest.raises(InputError, match="no request for release"):
            ledger.append("approved", release=release, actor="bob", body={"request": row})
    yes = ledger.append("approved", release=A, actor="bob", body={"request": asked.seq})
    with pytest.raises(ConflictError, match=r"already: row 3, approved .* by bob") as error:
        ledger.append("refused", release=A, actor="eve", body={"request": asked.seq})
    assert error.value.winner == yes
    ledger.append("refused", release=A, actor="eve", body={"request": again.seq})


def test_the_same_fact_is_kept_once(ledger: Ledger) -> None:
    def tell(**body: Any) -> Entry:
        return ledger.append("verdict", release=A, actor="ann", body=body, once=True)

    assert tell(verdict="PASS") == tell(verdict="PASS")
    assert tell(verdict="FAIL").seq == 2


def test_what_is_no_row_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InputError) as error:
        ledger.append("adopted", actor=" \n", body=pointer(A))
    assert error.value.offenders == ["channel: missing", "release: missing", "actor: missing"]
    with pytest.raises(InputError, match=r"needs body\['channel'\]"):
        ledger.append("promoted", channel="stable", release=A)
    with pytest.raises(InputError, match=r"needs body\['request'\]"):
        ledger.append("approved", release=A, body={"request": True})
    with pytest.raises(InputError, match="'nonsense' is none"):
        ledger.append("nonsense", actor="ann")  # type: ignore[arg-type]
    for body in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(InputError, match="not JSON"):
            ledger.append("policy", actor="ann", body=body)
    for text in ("a\0b", "\ud800"):
        with pytest.raises(InputError, match="reason: holds what is no text"):
            ledger.append("policy", actor="ann", reason=text)
    assert ledger.entries() == []


def test_what_was_live_and_who_let_it_in(ledger: Ledger) -> None:
    before = datetime.now(UTC)
    asked = ledger.append("requested", channel="stable", release=A, actor="ann")
    yes = ledger.append("approved", release=A, actor="bob", body={"request": asked.seq})
    first = promote(ledger, A, None)
    promote(ledger, C, None, channel="canary")
    middle = datetime.now(UTC)
    step = ledger.append(  # a candidate on the channel leaves its release as it is
        "rollout", channel="stable", release=B, actor="controller", after=first.seq, body=pointer(A)
    )
    during = datetime.now(UTC)
    last = promote(ledger, B, step.seq)
    assert ledger.at(before) == {}
    served = ledger.at(middle)
    assert set(served) == {"stable", "canary"}
    assert served["stable"].pointer.release == A and served["stable"].let_in == first
    assert served["stable"].approval == yes and served["canary"].approval is None
    assert ledger.at(during)["stable"].change == step
    assert ledger.at(during)["stable"].let_in == first
    now = ledger.at(datetime.now(UTC))["stable"]
    assert (now.pointer.release, now.let_in, now.approval) == (B, last, None)
    with pytest.raises(InputError, match="without a zone"):
        ledger.at(datetime(2026, 11, 21))


# -- tampering ---------------------------------------------------------------------------------


def fill(ledger: Ledger) -> list[Entry]:
    """Rows of every shape: empty and non-ASCII text, a body, a channel or none."""
    ledger.append("policy", actor="ann", body={"sha256": "0" * 64})
    ledger.append("verdict", release=A, actor="ann", body={"verdict": "PASS", "n": 0.5})
    one = promote(ledger, A, None, reason="Fünf % besser")
    promote(ledger, B, one.seq, reason="")
    ledger.append(
        "requested", channel="stable", release=C, actor="bob", reason="index", body={"n": 1}
    )
    return ledger.entries()


OTHER: dict[str, list[str]] = {  # per column: values that differ by as little as can be
    "seq": ["seq + 100", "-seq"],
    "time": ["'2026-01-01T00:00:00.000000Z'", "time || ' '", "replace(time, '-', '/')"],
    "kind": ["'rolled_back'", "'nonsense'", "kind || ' '"],
    "channel": ["channel || 'x'", "channel || ' '"],
    "release": ["'dddddddddddddddd'", "release || ' '"],
    "actor": ["'eve'", "upper(actor)"],
    "reason": ["reason || '.'", "'because'"],
    "body": ["'{}'", "replace(body, ':', ': ')", "'[]'", "'{'", "body || ' '", "'null'"],
    "prev": [f"'{'0' * 63}1'", "upper(prev) || 'A'", "''"],
    "hash": [f"'{'f' * 64}'", "substr(hash, 1, 63)", "hash || ' '", "''"],
}


def test_an_altered_value_is_found_in_every_column_of_every_row(
    where: Settings, ledger: Ledger
) -> None:
    rows = fill(ledger)
    assert set(OTHER) == set(COLUMNS)
    head = where.state_dir / "ledger.head"
    raw(where, f"CREATE TABLE kept AS SELECT * FROM {TABLE}")
    for column, values in OTHER.items():
        for row in rows:
            value = values[row.seq % len(values)]
            raw(where, f"UPDATE {TABLE} SET {column} = {value} WHERE seq = {row.seq}")
            problems = ledger.verify()
            assert problems, (column, value, row.seq)
            if column != "seq":
                assert any(f"row {row.seq}" in line for line in problems), (column, problems)
            assert head.read_text().strip() == str(rows[-1].head)
            raw(where, f"DELETE FROM {TABLE}", f"INSERT INTO {TABLE} SELECT * FROM kept")
    assert ledger.verify() == []


@given(data=st.data())
@run_with(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_other_value_is_found(data: st.DataObject, filled: Settings) -> None:
    """Property: one value of one column of one row, replaced by any other text, number or blob."""
    path = filled.state_dir / "ledger.db"
    column = data.draw(st.sampled_from(COLUMNS))
    seq = data.draw(st.integers(1, 5))
    kinds: Any = st.integers(-9, 99) if column == "seq" else st.text(max_size=70) | st.binary()
    with closing(sqlite3.connect(path)) as connection, closing(Ledger.open(filled)) as ledger:
        (old,) = connection.execute(f"SELECT {column} FROM {TABLE} WHERE seq = ?", [seq]).fetchone()
        new = data.draw(kinds.filter(lambda value: value != old and value not in range(1, 6)))
        try:
            text = f"UPDATE {TABLE} SET {column} = ? WHERE seq = ?"
            connection.execute(text, [new, seq])
        except (UnicodeEncodeError, sqlite3.Error):
            return
        connection.commit()
        try:
            assert ledger.verify(), (column, seq, new)
        finally:
            connection.execute(text, [old, new if column == "seq" else seq])
            connection.commit()
        assert ledger.verify() == []


@pytest.fixture
def filled(settings: Settings) -> Settings:
    """A SQLite ledger of five rows, without its guard."""
    with closing(Ledger.open(settings)) as ledger:
        fill(ledger)
    raw(settings)
    return settings


def test_removed_moved_and_inserted_rows_are_found(where: Settings, ledger: Ledger) -> None:
    rows = fill(ledger)
    raw(where, f"CREATE TABLE kept AS SELECT * FROM {TABLE}")
    copied = ", ".join(column for column in COLUMNS if column != "seq")
    tamperings = {
        "removed": [f"DELETE FROM {TABLE} WHERE seq = 3"],
        "the first removed": [f"DELETE FROM {TABLE} WHERE seq = 1"],
        "removed and closed up": [
            f"DELETE FROM {TABLE} WHERE seq = 3",
            f"UPDATE {TABLE} SET seq = seq - 1 WHERE seq = 4",
            f"UPDATE {TABLE} SET seq = seq - 1 WHERE seq = 5",
        ],
        "two swapped": [
            f"UPDATE {TABLE} SET seq = 99 WHERE seq = 2",
            f"UPDATE {TABLE} SET seq = 2 WHERE seq = 3",
            f"UPDATE {TABLE} SET seq = 3 WHERE seq = 99",
        ],
        "inserted": [
            f"UPDATE {TABLE} SET seq = 6 WHERE seq = 5",
            f"INSERT INTO {TABLE} (seq, {copied}) SELECT 5, {copied} FROM {TABLE} WHERE seq = 2",
        ],
        "the end cut off": [f"DELETE FROM {TABLE} WHERE seq >= 4"],
        "all of it": [f"DELETE FROM {TABLE}"],
    }
    for name, statements in tamperings.items():
        raw(where, *statements)
        assert ledger.verify(), name
        assert ledger.verify(rows[-1].head), name
        raw(where, f"DELETE FROM {TABLE}", f"INSERT INTO {TABLE} SELECT * FROM kept")
    assert ledger.verify(rows[-1].head) == []


def test_a_rewritten_end_is_found_by_a_head_noted_elsewhere(
    where: Settings, ledger: Ledger
) -> None:
    """Who owns database and state folder may forge the end and the head file: not the noted one."""
    rows = fill(ledger)
    noted = Head.parse(f" {rows[-1].head}\n")
    raw(where, f"DELETE FROM {TABLE} WHERE seq >= 4")
    (where.state_dir / "ledger.head").write_text(f"{rows[2].head}\n")
    assert ledger.verify() == []
    assert any("the newest row here is 3" in line for line in ledger.verify(noted))
    promote(ledger, C, 3)
    promote(ledger, A, 4)
    assert ledger.verify() == []
    assert ledger.verify(noted) == ["the head given has another hash than row 5 here"]
    with pytest.raises(InputError, match="not the head of a ledger"):
        Head.parse("5:abc")


def test_the_guard_refuses_everything_but_the_next_row(where: Settings, ledger: Ledger) -> None:
    rows = fill(ledger)
    same = "time, kind, channel, release, actor, reason, body"
    statements = [
        f"UPDATE {TABLE} SET reason = 'x'",
        f"DELETE FROM {TABLE}",
        # The right number and another row's prev; the right prev and a gap.
        f"INSERT INTO {TABLE} SELECT seq + 5, {same}, prev, hash FROM {TABLE} WHERE seq = 1",
        f"INSERT INTO {TABLE} SELECT 9, {same}, hash, prev FROM {TABLE} WHERE seq = 5",
    ]
    statements.append(
        f"TRUNCATE {TABLE}"
        if where.postgres_url
        else f"INSERT OR REPLACE INTO {TABLE} SELECT seq, time, kind, channel, release, 'eve',"
        f" reason, body, prev, hash FROM {TABLE} WHERE seq = 5"
    )
    for statement in statements:
        with pytest.raises(Exception, match=r"append-only|only the next row"):
            raw(where, statement, guard=True)
    assert ledger.entries() == rows and ledger.verify() == []


# -- crashes and races -------------------------------------------------------------------------


def _append_many(where: Settings, number: int, count: int, start: Any) -> None:
    with closing(Ledger.open(where)) as ledger:
        start.wait(30)
        for n in range(count):
            ledger.append("verdict", release=A, actor=f"p{number}", body={"n": n})


def test_sixteen_processes_make_one_chain(where: Settings) -> None:
    """The table does not exist when they begin: its making is raced too."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(16)
    children = [fork.Process(target=_append_many, args=(where, n, 8, start)) for n in range(16)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 16
    with closing(Ledger.open(where)) as ledger:
        rows = ledger.entries()
        assert [row.seq for row in rows] == list(range(1, 16 * 8 + 1))
        by_process = {(row.actor, row.body["n"]) for row in rows}
        assert len(by_process) == 16 * 8
        assert ledger.verify(ledger.head()) == []
    assert (where.state_dir / "ledger.head").read_text().startswith("128:")


def _promote_at_once(where: Settings, number: int, start: Any, told: Any) -> None:
    with closing(Ledger.open(where)) as ledger:
        last = ledger.last("stable")
        start.wait(30)
        try:
            promote(ledger, f"{number:016x}", last.seq if last else None, actor=f"p{number}")
            told.put((number, "won"))
        except ConflictError as error:
            told.put((number, str(error)))


def test_of_many_promotions_at_once_one_wins(where: Settings) -> None:
    fork = multiprocessing.get_context("fork")
    start, told = fork.Barrier(8), fork.Queue()
    children = [
        fork.Process(target=_promote_at_once, args=(where, n, start, told)) for n in range(8)
    ]
    for child in children:
        child.start()
    said = dict(told.get(timeout=60) for _ in children)
    for child in children:
        child.join(60)
    with closing(Ledger.open(where)) as ledger:
        (row,) = ledger.entries()
    winner = int(row.release, 16)
    assert said.pop(winner) == "won" and len(said) == 7
    assert all(f"{row.release} on stable by p{winner} at" in text for text in said.values())


def _die_at(where: Settings, kill_at: int) -> None:
    """Append a row, and die before the n-th line of code that runs."""
    met: set[tuple[str, int]] = set()

    def line(frame: Any, event: str, _: Any) -> Any:
        if "/resources/ledger/" not in frame.f_code.co_filename and not (
            frame.f_code.co_filename.endswith("/resources/database.py")
        ):
            return None
        if event == "line":
            met.add((frame.f_code.co_filename, frame.f_lineno))
            if len(met) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    with closing(Ledger.open(where)) as ledger:
        sys.settrace(line)
        ledger.append("verdict", release=B, actor="killed", body={"n": kill_at})
        sys.settrace(None)


@pytest.mark.slow  # 75 processes, 10 s
def test_killed_at_any_line_the_chain_is_whole_and_goes_on(settings: Settings) -> None:
    where = settings
    fork = multiprocessing.get_context("fork")
    ledger = Ledger.open(where)
    ledger.append("verdict", release=A, actor="ann")
    head = where.state_dir / "ledger.head"
    behind, number, code = 0, 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        child = fork.Process(target=_die_at, args=(where, number))
        child.start()
        child.join(30)
        assert child.exitcode is not None
        code = child.exitcode
        newest = ledger.head()
        assert newest is not None
        behind += head.read_text().strip() != str(newest)
        assert ledger.verify() == [], number
        assert head.read_text().strip() == str(newest)  # a whole chain brings the file forward
        ledger.append("policy", actor="ann")
    assert code == 0 and number > 60, number
    assert 1 <= behind < 30  # it did die between row and file
    assert ledger.verify() == []


def test_the_head_file_missing_broken_and_ahead(where: Settings, ledger: Ledger) -> None:
    rows = fill(ledger)
    head = where.state_dir / "ledger.head"
    head.unlink()
    assert ["ledger.head is missing" in line for line in ledger.verify()] == [True]
    assert ledger.verify(rows[1].head) == [] and head.read_text().strip() == str(rows[-1].head)
    head.write_text("nonsense")
    assert ["not the head of a ledger" in line for line in ledger.verify()] == [True]
    with pytest.raises(InputError, match="not the head"):
        promote(ledger, C, 4)
    head.write_text(f"9:{'0' * 64}\n")
    assert ["row 9, and the newest row here is 5" in line for line in ledger.verify()] == [True]
    with pytest.raises(InputError, match="row 9 is missing, and the newest one here is 5"):
        promote(ledger, C, 4)
    head.write_text(f"2:{'0' * 64}\n")
    with pytest.raises(InputError, match="row 2 is another one"):
        promote(ledger, C, 4)
    head.write_text(f"{rows[2].head}\n")  # killed long ago: what follows continues it
    assert ledger.verify() == [] and head.read_text().strip() == str(rows[-1].head)


def test_a_lost_ledger_takes_no_rows(settings: Settings) -> None:
    ledger = Ledger.open(settings)
    promote(ledger, A, None)
    (settings.state_dir / "ledger.db").unlink()
    with pytest.raises(ServiceError):
        ledger.entries()
    fresh = Ledger.open(settings)
    with pytest.raises(InputError, match="row 1 is missing, and the newest one here is none"):
        promote(fresh, A, None)
    assert ["rows are missing" in line for line in fresh.verify()] == [True]


def test_a_row_stands_although_its_head_cannot_be_noted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    ledger = Ledger.open(settings)
    with monkeypatch.context() as patch:
        patch.setattr("resources.ledger.head.os.replace", full)
        assert promote(ledger, A, None).seq == 1
    assert "No space left" in caplog.text
    assert ledger.verify() == []


def test_who_acts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert actor({"RATCHET_ACTOR": "ann", "DAGSTER_DVC_RUN_ID": "77"}) == "dagster:77"
    assert actor({"RATCHET_ACTOR": " Ann\n Lee "}) == "Ann Lee"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    (tmp_path / "config").write_text("[user]\n\tname = Ann\n\temail = ann@example.org\n")
    assert actor({}) == "Ann <ann@example.org>"
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("LOGNAME", "carl")
    assert actor({}) == "carl"
