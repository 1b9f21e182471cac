"""`ratchet ledger`, and what `ratchet status` and `ratchet trace` say from it."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.errors import InputError, NotFoundError
from contracts.records import Channel, RequestRecord
from contracts.settings import Settings
from pipelines import cli, status, trace
from pipelines.ledger import moment
from resources import promotion, releases
from resources.ledger import Entry, Ledger
from resources.request_writer import DayWriter
from tests.resources.test_requests import record
from tests.serving.factory import build

GATE = {"verdict": "PASS", "policy_sha256": "f" * 64}


def ratchet(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["ledger", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def rows(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """A release that was judged, asked for, approved and promoted, and its pointer."""
    monkeypatch.setenv("RATCHET_ACTOR", "ann")
    path = releases.install(build(settings.root, gate=GATE), settings.root, settings)
    release = releases.load(settings, path.name).release
    ledger = Ledger.open(settings)
    promotion.record_verdict(ledger, release)
    asked = ledger.append("requested", channel="stable", release=release.id)
    ledger.append("approved", release=release.id, actor="bob", body={"request": asked.seq})
    pointer = Channel(name="stable", release=release.id, engine_url="http://127.0.0.1:1", model="m")
    promotion.change(ledger, "promoted", pointer, None, "it is\nbetter")
    promotion.follow(settings, ledger, "stable")
    return ledger.entries()


def test_rows_are_shown(rows: list[Entry]) -> None:
    shown = ratchet("log").splitlines()
    assert len(shown) == 5 and shown[0].startswith("row 1, policy by ann at ")
    assert shown[4].startswith(f"row 5, promoted {rows[4].release} on stable by ann at 20")
    assert shown[4].endswith("UTC: it is better")
    assert json.loads(ratchet("log", "--json")) == [row.model_dump() for row in rows]
    few = ratchet("log", "--kind", "approved", "--kind", "requested", "-n", "1")
    assert few.startswith("row 4, approved")
    assert "no such row" in ratchet("log", "--channel", "other")
    assert len(ratchet("log", "--since", "-1h").splitlines()) == 5
    assert json.loads(ratchet("show", "5", "--json")) == rows[4].model_dump()
    assert f"prev     {rows[3].hash}" in ratchet("show", "5")
    with pytest.raises(NotFoundError, match="no row 9"):
        ratchet("show", "9")


def test_what_was_live_at_a_time(rows: list[Entry]) -> None:
    assert "no channel served anything" in ratchet("at", "-2h")
    for time in ("-0s", (datetime.now(UTC) + timedelta(minutes=1)).isoformat()):
        _, live, let_in, approved = ratchet("at", time).splitlines()
        assert live == f"stable    {rows[4].release}"
        assert "let in: row 5, promoted" in let_in and "by ann" in let_in
        assert "approved: row 4, approved" in approved and "by bob" in approved
    value = json.loads(ratchet("at", "2999-01-01 14:02", "--json"))["stable"]
    assert (value["let_in"]["seq"], value["approval"]["seq"]) == (5, 4)


def test_times_as_people_write_them() -> None:
    now = datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert moment("-2h", now) == now - timedelta(hours=2)
    assert moment("-90m", now) == now - timedelta(minutes=90)
    assert moment("2026-11-20 14:02") == datetime(2026, 11, 20, 14, 2, tzinfo=UTC)
    assert moment("2026-11-20T14:02:00+01:00") == datetime(2026, 11, 20, 13, 2, tzinfo=UTC)
    assert moment("2026-11-20T14:02:00Z") == datetime(2026, 11, 20, 14, 2, tzinfo=UTC)
    for text in ("yesterday", "-2y", "-h", "14:02", ""):
        with pytest.raises(InputError, match="is no time"):
            moment(text)


def test_verify_says_what_is_wrong_and_with_which_status(
    rows: list[Entry], settings: Settings
) -> None:
    said = ratchet("verify")
    head = said.splitlines()[-1].removeprefix("head ")
    assert "5 rows, all as they were written" in said and head == str(rows[-1].head)
    assert ratchet("verify", "--head", head) == said
    assert json.loads(ratchet("verify", "--json")) == {"head": head, "problems": []}
    other = f"{rows[2].seq}:{'0' * 64}"
    assert "another hash than row 3" in ratchet("verify", "--head", other, code=1)
    stood = releases.read_channel(settings, "stable")
    assert stood is not None
    releases.write_channel(settings, stood.model_copy(update={"release": "d" * 16}))
    assert f"points at {'d' * 16}, and row 5" in ratchet("verify", code=1)
    releases.write_channel(settings, stood)
    assert ratchet("verify") == said
    with sqlite3.connect(settings.state_dir / "ledger.db") as connection:
        connection.execute("DROP TRIGGER ratchet_ledger_no_update")
        connection.execute("UPDATE ratchet_ledger SET actor = 'eve' WHERE seq = 5")
    assert "row 5: it was altered" in ratchet("verify", code=1)
    assert json.loads(ratchet("verify", "--json", code=1))["head"] is None


def test_status_shows_who_changed_a_channel_last(rows: list[Entry], settings: Settings) -> None:
    value: dict[str, Any] = {
        "release": None, "dvc": {}, "services": {}, "spool": 0, "published_index": None,
        "channels": status.channels(settings), "ledger": status.ledger(settings),
    }  # fmt: skip
    assert value["ledger"]["problems"] == []
    shown = status.render(value)
    assert f"          {rows[4]}: it is better\n" in shown
    assert json.loads(json.dumps(value))["ledger"]["channels"]["stable"]["actor"] == "ann"
    (settings.state_dir / "ledger.db").write_bytes(b"no database at all")
    value["ledger"] = status.ledger(settings)
    assert "ledger    The ledger cannot be read" in status.render(value)


def test_from_an_answer_to_who_let_it_in_and_to_every_input(
    rows: list[Entry], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace.Runs, "__init__", _no_runs)
    release = rows[4].release
    now = datetime.now(UTC)
    found = log(settings, release, now)
    value = trace.trace(found.response_id, settings)
    assert value["release"]["let_in"] == f"{rows[4]}: it is better"
    shown = trace.render(value)
    assert f"let in: row 5, promoted {release} on stable by ann at" in shown
    body = releases.load(settings, release).release
    digests = [member.md5 for member in body.members.values()]
    digests += [body.prompt["sha256"], body.eval_set, GATE["policy_sha256"]]
    assert len(digests) == 7 and all(digest in shown for digest in digests)
    early = log(settings, release, now - timedelta(days=1))
    assert "no row brought it" in trace.trace(early.response_id, settings)["release"]["let_in"]


def log(settings: Settings, release: str, time: datetime) -> RequestRecord:
    """An answer of the release, in the request log."""
    day = time.strftime("%Y-%m-%d")
    stamp = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    value = record(1, day, time=stamp, release=release, chunk_ids=[], scores=[], cited=[])
    writer = DayWriter(settings.requests_dir)
    writer.append([value.model_dump()])
    writer.close()
    return value


def _no_runs(self: trace.Runs, settings: Settings) -> None:
    """No tracking store, as on a machine that only serves."""
    self.tracking, self.state = None, "unavailable"
