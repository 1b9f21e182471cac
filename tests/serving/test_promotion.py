"""Promotions and rollbacks through the ledger: who wins, what a kill leaves, what cannot be."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import (
    ApprovalError,
    ConflictError,
    GateError,
    InputError,
    NotFoundError,
    ServiceError,
)
from contracts.records import Channel
from contracts.settings import Settings
from resources import approvals, promotion, releases
from resources.ledger import Ledger
from resources.rag import Rag
from serving.deploy.__main__ import main
from serving.deploy.deployment import Deployer, Patience
from serving.engines.record import list_records, stop
from tests.servers import postgres_server, postgres_url  # noqa: F401
from tests.serving.factory import point
from tests.serving.test_deploy import deployer, engines, make, open_json_rag, up  # noqa: F401

pytestmark = pytest.mark.slow  # an engine starts in about a second


@pytest.fixture(autouse=True)
def _ann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_ACTOR", "ann")


def kinds(settings: Settings) -> list[str]:
    return [row.kind for row in Ledger.open(settings).entries()]


def pointer(settings: Settings) -> Channel:
    found = releases.read_channel(settings, "stable")
    assert found is not None
    return found


def test_a_promotion_is_a_row_first(deployer: Deployer, settings: Settings) -> None:  # noqa: F811
    path = make(settings, "one", gate={"verdict": "PASS", "policy_sha256": "0" * 64})
    first = deployer.up(str(path), "stable", path.parents[1], reason="the first one")
    ledger = Ledger.open(settings)
    policy, verdict, row = ledger.entries()
    assert [policy.kind, verdict.kind, row.kind] == ["policy", "verdict", "promoted"]
    assert policy.body == {"sha256": "0" * 64} and verdict.release == first["release"]
    assert (row.actor, row.reason, row.seq) == ("ann", "the first one", first["ledger"])
    assert row.pointer == pointer(settings) and ledger.verify() == []
    assert up(deployer, path)["changed"] is False and len(ledger.entries()) == 3
    deployer.engines.end(first["release"])
    again = deployer.ensure("stable")["channels"]["stable"]  # another port, and no row for it
    assert again["changed"] and len(ledger.entries()) == 3
    assert pointer(settings).engine_url == again["engine_url"] != first["engine_url"]
    assert promotion.differences(settings, ledger) == []


def test_rollback_goes_back_and_further_back(deployer: Deployer, settings: Settings) -> None:  # noqa: F811
    with pytest.raises(ServiceError, match="Nothing was ever deployed"):
        deployer.rollback("stable", None, "why")
    one, two = (up(deployer, make(settings, mark))["release"] for mark in ("one", "two"))
    three = up(deployer, make(settings, "three"))["release"]
    back = deployer.rollback("stable", None, "three is\nworse")
    assert (back["release"], back["previous"]) == (two, one)
    row = deployer.ledger.last("stable")
    assert row is not None and (row.kind, row.reason) == ("rolled_back", "three is\nworse")
    assert engines(settings) == [two] and pointer(settings).release == two
    further = deployer.rollback("stable", None, "so is two")
    assert (further["release"], further["previous"]) == (one, None)
    with pytest.raises(InputError, match="one release only"):
        deployer.rollback("stable", None, "and one?")
    with pytest.raises(InputError, match=r"serves release .* already"):
        deployer.rollback("stable", one, "to itself")
    with pytest.raises(InputError, match="never served release 0") as error:
        deployer.rollback("stable", "0" * 16, "to nothing")
    assert error.value.offenders == [f"served: {release}" for release in (one, two, three)]
    (settings.releases_dir / three / "bundle/checkpoint/config.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        deployer.rollback("stable", three, "to what is broken")
    shutil.rmtree(settings.releases_dir / two)
    with pytest.raises(NotFoundError, match="not installed"):
        deployer.rollback("stable", two, "to what is gone")
    assert engines(settings) == [one] and pointer(settings).release == one
    assert kinds(settings).count("rolled_back") == 2 and deployer.ledger.verify() == []


def rival(settings: Settings, release: str = "c" * 16) -> None:
    """Somebody else's promotion."""
    ledger = Ledger.open(settings)
    last = ledger.last("stable")
    assert last is not None and last.pointer is not None
    other = last.pointer.model_copy(update={"release": release})
    ledger.append(
        "promoted", channel="stable", release=release, actor="bob", reason="mine is better",
        body={"channel": other.model_dump()}, after=last.seq,
    )  # fmt: skip


def test_a_slower_promotion_is_told_and_leaves_no_engine(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    first = up(deployer, make(settings, "one"))

    def slow(installed: releases.Installed) -> Rag:
        rival(settings)
        return open_json_rag(installed)

    loser = Deployer(settings, lambda _: None, Patience(ready=20, drain=1), slow)
    with pytest.raises(ConflictError, match=r"cccc on stable by bob at .* \(mine is better\)"):
        up(loser, make(settings, "two"))
    assert engines(settings) == [first["release"]]
    assert kinds(settings).count("promoted") == 2 and deployer.ledger.verify() == []


@pytest.fixture
def machines(settings: Settings, postgres_url: str) -> Iterator[list[Settings]]:  # noqa: F811
    """Two checkouts' state folders and one ledger."""
    found = [
        replace(settings, state_dir=settings.root / name, postgres_url=postgres_url)
        for name in ("left", "right")
    ]
    yield found
    for one in found:
        for record in list_records(one.engines_dir):
            stop(record, 1)


def test_of_two_machines_that_promote_at_once_one_wins(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
    machines: list[Settings],
) -> None:
    del deployer  # for its environment
    together = threading.Barrier(2)
    said: dict[str, Any] = {}

    def open_rag(installed: releases.Installed) -> Rag:
        together.wait(30)  # both have seen the same last row by now
        return open_json_rag(installed)

    def work(one: Settings, path: Path) -> None:
        mine = Deployer(one, lambda _: None, Patience(ready=20, drain=1), open_rag)
        try:
            said[one.state_dir.name] = mine.up(str(path), "stable", path.parents[1])
        except Exception as error:
            said[one.state_dir.name] = error

    paths = [make(settings, "one"), make(settings, "two")]
    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(machines, paths, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    won = next(one for one in machines if isinstance(said[one.state_dir.name], dict))
    lost = next(one for one in machines if one is not won)
    error = said[lost.state_dir.name]
    release = said[won.state_dir.name]["release"]
    assert isinstance(error, ConflictError), error
    assert f"promoted {release} on stable by ann at" in str(error)
    assert engines(won) == [release] and engines(lost) == []
    assert releases.read_channel(lost, "stable") is None
    ledger = Ledger.open(won)
    assert kinds(won).count("promoted") == 1 and ledger.verify(ledger.head()) == []
    ledger.close()


def test_broken_off_after_the_row_the_engine_stays_and_the_next_command_ends_it(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = up(deployer, make(settings, "one"))
    two = make(settings, "two")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("resources.releases.write_channel", full)
        with pytest.raises(OSError, match="No space left"):
            up(deployer, two)
    second = releases.read_release(two).id
    assert pointer(settings).release == first["release"]
    assert set(engines(settings)) == {first["release"], second}
    (said,) = promotion.differences(settings, deployer.ledger)
    assert f"points at {first['release']}, and row" in said and second in said
    done = deployer.ensure(None)["channels"]["stable"]
    assert done["release"] == second and done["changed"] is False  # catching up was enough
    assert pointer(settings).release == second and engines(settings) == [second]
    assert kinds(settings).count("promoted") == 2


def test_an_interrupt_in_the_very_row_keeps_the_engine(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = promotion.change

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("resources.promotion.change", interrupted)
        with pytest.raises(KeyboardInterrupt):
            up(deployer, make(settings, "one"))
    assert len(engines(settings)) == 1 and releases.list_channels(settings) == []
    deployer.ensure(None)
    assert pointer(settings).release == engines(settings)[0]


def test_channels_older_than_the_ledger_are_adopted_once(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    path = make(settings, "one")
    old = releases.install(path, path.parents[1], settings).name
    point(settings, old, "http://127.0.0.1:1")
    point(settings, old, "http://127.0.0.1:1", "canary")
    second = up(deployer, make(settings, "two"))
    assert second["previous"] == old
    rows = deployer.ledger.entries()
    assert [row.kind for row in rows] == ["adopted", "adopted", "verdict", "promoted"]
    assert {row.actor for row in rows[:2]} == {"migration"} and rows[0].release == old
    point(settings, old, "http://127.0.0.1:1", "made-by-hand")
    assert promotion.adopt(settings, deployer.ledger) == []
    (said,) = promotion.differences(settings, deployer.ledger)
    assert "made-by-hand has a pointer and no row" in said


def test_what_is_risky_waits_for_a_person_and_the_row_says_who(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    first = up(deployer, make(settings, "one"))["release"]
    policy = settings.root / "data/policies/approval.yaml"
    policy.write_text(policy.read_text().replace("approve_from: high", "approve_from: low"))
    two = make(settings, "two")
    for _ in range(2):  # asked once
        with pytest.raises(ApprovalError, match="waits for a person"):
            up(deployer, two)
    assert engines(settings) == [first] and kinds(settings)[-1] == "requested"
    ledger = deployer.ledger
    (request,) = approvals.requests(ledger)
    token = approvals.token_of(settings, request)
    yes = approvals.answer(
        settings, ledger, request.seq, token=token, approve=True, name="bob", reason="looked at it"
    )
    second = up(deployer, two)
    row = ledger.last("stable")
    assert row is not None and row.body["approval"] == yes.seq
    assert ledger.at(datetime.now(UTC))["stable"].approval == yes
    assert kinds(settings).count("requested") == 1
    back = deployer.rollback("stable", None, "it was not better")  # a way back waits for nobody
    assert (back["release"], second["previous"]) == (first, first)
    deployer.ensure(None)


def test_a_pointer_edited_by_hand_is_named_and_put_right(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    first = up(deployer, make(settings, "one"))
    stood = pointer(settings)
    for edited in ({"release": "d" * 16}, {"previous": "d" * 16}, {"model": "other"}):
        releases.write_channel(settings, stood.model_copy(update=edited))
        assert len(promotion.differences(settings, deployer.ledger)) == 1, edited
        deployer.ensure(None)
        assert pointer(settings) == stood, edited
    (settings.channels_dir / "stable.json").write_text("{half")
    deployer.ensure(None)
    assert pointer(settings).release == first["release"] and kinds(settings)[-1] == "promoted"


def test_a_rollout_under_way_is_not_rolled_back_past_its_stable_release(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    one, two = (up(deployer, make(settings, mark))["release"] for mark in ("one", "two"))
    last = deployer.ledger.last("stable")
    assert last is not None and last.pointer is not None
    deployer.ledger.append(
        "rollout", channel="stable", release="e" * 16, after=last.seq,
        body={"channel": last.pointer.model_dump()},
    )  # fmt: skip
    with pytest.raises(InputError, match="rollout of release eeee") as error:
        deployer.rollback("stable", None, "it is slow")
    assert "serving.rollout abort" in str(error.value)
    assert deployer.rollback("stable", one, "all of it")["release"] == one
    assert pointer(settings).release == one != two


def test_the_gate_is_asked_on_every_way(deployer: Deployer, settings: Settings) -> None:  # noqa: F811
    path = make(settings, "failed", gate={"verdict": "FAIL"})
    failed = releases.install(path, path.parents[1], settings).name
    up(deployer, make(settings, "one"))
    with pytest.raises(GateError):
        deployer.up(failed, "stable", settings.root)
    assert "failed" not in str(kinds(settings)) and len(engines(settings)) == 1


def test_the_command_wants_a_reason(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rollback"])
    assert "--reason" in capsys.readouterr().err
    assert main(["rollback", "--reason", "x"]) == ServiceError.exit_code
    assert "Nothing was ever deployed" in capsys.readouterr().err
    assert settings.state_dir.exists()


# -- kill -9 at every line -----------------------------------------------------------------------

FILES = ("/serving/deploy/deployment.py", "/resources/promotion.py", "/resources/releases.py",
         "/resources/ledger/head.py")  # fmt: skip


def _die_at(settings: Settings, release: str, kill_at: int) -> None:
    """Promote, and die before the n-th line of code that runs from the writing of the row on."""
    met: set[tuple[str, int]] = set()
    armed = False

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal armed
        name = frame.f_code.co_filename
        armed = armed or (frame.f_code.co_name == "change" and name.endswith("/promotion.py"))
        if not name.endswith(FILES):
            return None
        if event == "line" and armed:
            met.add((name, frame.f_lineno))
            if len(met) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    mine = Deployer(settings, lambda _: None, Patience(ready=20, drain=1), open_json_rag)
    sys.settrace(line)
    mine.up(release, "stable", settings.root)
    sys.settrace(None)


def test_killed_at_any_line_the_ledger_leads_and_the_next_command_ends_it(
    deployer: Deployer,  # noqa: F811
    settings: Settings,
) -> None:
    first = up(deployer, make(settings, "one"))["release"]
    path = make(settings, "two")
    installed = releases.load(settings, releases.install(path, path.parents[1], settings).name)
    deployer.engines.ready(installed, {first})  # so that no child has to start it
    kept = settings.root / "kept"
    names = ("ledger.db", "ledger.head", "channels/stable.json")
    for name in names:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(settings.state_dir / name, kept / name)
    fork = multiprocessing.get_context("fork")
    seen, number, code = set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        for name in names:
            shutil.copy(kept / name, settings.state_dir / name)
        child = fork.Process(target=_die_at, args=(settings, installed.id, number))
        child.start()
        child.join(60)
        assert child.exitcode is not None
        code = child.exitcode
        ledger = Ledger.open(settings)
        assert ledger.verify() == [], number
        last = ledger.last("stable")
        assert last is not None
        seen.add((last.release == installed.id, pointer(settings).release == installed.id))
        rows = len(ledger.entries())
        deployer._catch_up()
        assert pointer(settings).release == last.release, number
        assert len(ledger.entries()) == rows and promotion.differences(settings, ledger) == []
        assert engines(settings).count(installed.id) == 1, number
    assert code == 0 and number > 60, number
    # Never the pointer before the row; and the child did die before, between and after the two.
    assert seen == {(False, False), (True, False), (True, True)}
    assert json.loads((settings.channels_dir / "stable.json").read_text())["previous"] == first
