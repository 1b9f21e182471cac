"""The controller over a real ledger, real pointer files and a real log; engines are a file."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ApprovalError, ConflictError, InputError, NotFoundError
from contracts.records import Channel
from contracts.settings import Settings
from resources import approvals, promotion, releases
from resources.ledger import Ledger
from serving.rollout import controller as module
from serving.rollout.controller import Controller, Report
from serving.rollout.state import BODY, read
from tests.serving.rollouts import FileEngines, Traffic, controller, deployed, install, quick


@pytest.fixture
def pair(settings: Settings) -> tuple[str, str]:
    """Two installed releases; the channel serves the first."""
    first, second = install(settings, "one"), install(settings, "two")
    deployed(settings, first)
    return first, second


@pytest.fixture
def engines(settings: Settings, pair: tuple[str, str]) -> FileEngines:
    found = FileEngines(settings)
    found.start(pair[0])
    return found


def pointer(settings: Settings) -> Channel:
    found = releases.read_channel(settings, "stable")
    assert found is not None
    return found


def share(settings: Settings) -> float | None:
    candidate = pointer(settings).candidate
    return candidate.share if candidate else None


def begun(
    settings: Settings, pair: tuple[str, str], engines: FileEngines, strategy: Any = "canary",
    **policy: Any,
) -> tuple[Controller, Traffic]:  # fmt: skip
    """A rollout whose first step has begun."""
    found, traffic = controller(settings, engines), Traffic(settings)
    traffic.answers(30)
    found.begin(pair[1], quick(**policy), strategy)
    assert [found.tick().did, found.tick().did] == ["observe", "forward"]
    return found, traffic


def end(found: Controller, traffic: Traffic, **candidate: Any) -> Report:
    """Traffic and ticks until the rollout has ended."""
    for _ in range(60):
        traffic.answers(20, **candidate)
        report = found.tick()
        if report.did in ("promote", "back"):
            return report
    raise AssertionError(report)


def test_a_good_candidate_goes_all_the_way(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    first, second = pair
    found, traffic = controller(settings, engines), Traffic(settings)
    traffic.answers(10)
    found.begin(second, quick(), "canary", "try it")
    assert share(settings) is None and second not in engines.running()
    assert found.tick().did == "observe" and share(settings) == 0.0
    assert "waiting for 20 answers" in found.tick().why
    traffic.answers(15)
    assert found.tick().did == "forward" and share(settings) == 0.2
    assert found.tick().why == "0 of 10 answers"
    traffic.answers(60)
    assert found.tick().did == "forward" and share(settings) == 0.5
    traffic.answers(40)
    assert found.tick().why == "20 of 40 answers"
    report = end(found, traffic)
    assert report.did == "promote"
    assert pointer(settings) == Channel(
        name="stable", release=second, engine_url=f"http://{second}", model="nano", previous=first
    )
    assert engines.running() == {first, second}  # a tick does one thing
    assert found.tick().why == "no rollout is under way" and engines.running() == {second}
    rows = Ledger.open(settings).entries(channel="stable")
    assert [(row.kind, row.body.get(BODY, {}).get("action")) for row in rows] == [
        ("adopted", None), ("rollout", "begin"), ("rollout", "observe"), ("rollout", "forward"),
        ("rollout", "forward"), ("promoted", "promote"),
    ]  # fmt: skip
    assert rows[1].reason == "try it" and rows[-1].body[BODY]["findings"]
    assert Ledger.open(settings).verify() == []


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("floor errors", {"error": "engine_error", "status": 502}),
        ("floor unsafe", {"error": "output_blocked", "status": 502}),
        ("ttft", {"ttft_ms": 900.0}),
        ("ttft", {"error": "client_disconnected", "ttft_ms": None, "latency_ms": 5000.0}),
        ("cost", {"completion_tokens": 90}),
        ("refusals", {"answer": "The documents do not say.", "refused": True}),
        ("quality", {"answer": "Nothing of it [7]", "cited": []}),
    ],
)
def test_a_bad_candidate_goes_back_for_the_right_reason(
    settings: Settings, pair: tuple[str, str], engines: FileEngines, name: str, bad: dict[str, Any]
) -> None:
    found, traffic = begun(settings, pair, engines)
    report = end(found, traffic, **bad)
    assert report.did == "back" and name in report.why
    assert pointer(settings).release == pair[0] and share(settings) is None
    last = Ledger.open(settings).last("stable")
    assert last is not None and (last.kind, last.release) == ("rolled_back", pair[0])
    assert last.body[BODY]["candidate"] == pair[1] and name in last.reason
    found.tick()
    assert engines.running() == {pair[0]}


def test_what_says_nothing_about_the_candidate_is_not_held_against_it(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    found, traffic = begun(settings, pair, engines)
    for harmless in (
        {"error": "content_blocked", "status": 400}, {"error": "rate_limit_exceeded"},
        {"error": "client_disconnected", "ttft_ms": 50.0}, {"cached": "exact", "ttft_ms": 9e9},
        {"error": "client_disconnected", "ttft_ms": None, "latency_ms": 20.0},
    ):  # fmt: skip
        traffic.answers(100, **harmless)
    report = found.tick()
    assert report.did == "nothing" and report.why == "0 of 10 answers"


def test_only_the_first_answer_of_a_session_counts_but_floors_see_all(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    found, traffic = begun(settings, pair, engines)
    traffic.answers(100, session="s1")
    assert found.tick().why == "1 of 10 answers"
    traffic.answers(200, session="s1", error="engine_timeout", status=504)
    report = found.tick()
    assert report.did == "back" and "floor errors" in report.why


def test_answers_that_another_release_had_to_give_are_failures(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    found, traffic = begun(settings, pair, engines)
    assert "floor errors" in end(found, traffic, release=pair[0]).why


def test_an_engine_that_dies_or_never_lives(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    found, _ = begun(settings, pair, engines)
    engines.kill(pair[1])
    report = found.tick()
    assert report.did == "back" and "does not run" in report.why
    assert share(settings) is None
    engines.fails = True
    found.begin(pair[1], quick(), "canary")
    report = found.tick()
    assert report.did == "back" and "It does not come up." in report.why


@pytest.mark.parametrize("strategy", ["ab", "shadow", "blue_green"])
@pytest.mark.parametrize("good", [True, False])
def test_other_strategies_end_too(
    settings: Settings, pair: tuple[str, str], engines: FileEngines, strategy: str, good: bool
) -> None:
    found, traffic = begun(settings, pair, engines, strategy)
    assert share(settings) == {"ab": 0.5, "shadow": 0.9, "blue_green": 1.0}[strategy]
    bad = {} if good else {"ttft_ms": 900.0}
    mark = {"arm": "shadow"} if strategy == "shadow" else {}
    assert end(found, traffic, **mark, **bad).did == ("promote" if good else "back")


@pytest.mark.parametrize(
    ("policy", "did"),
    [
        ({"requests": 30}, "back"), ({"step_minutes": 1e-9}, "back"),
        ({"requests": 30, "undecided": "hold"}, "nothing"),
    ],
)  # fmt: skip
def test_undecided_ends_by_policy(
    settings: Settings, pair: tuple[str, str], engines: FileEngines, policy: dict[str, Any],
    did: str,
) -> None:  # fmt: skip
    found, traffic = begun(settings, pair, engines, **policy)
    traffic.answers(40, error="content_blocked")
    report = found.tick()
    assert report.did == did and "undecided" in report.why


def test_abort_supersede_and_refusals(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    first, second = pair
    found, _ = begun(settings, pair, engines)
    with pytest.raises(ConflictError, match="is under way"):
        found.begin(second, quick(), "canary")
    row = found.abort("it smells")
    assert (row.kind, row.reason, share(settings)) == ("rolled_back", "it smells", None)
    with pytest.raises(NotFoundError):
        found.abort("again")
    with pytest.raises(InputError, match="already"):
        found.begin(first, quick(), "canary")
    # A promotion by somebody else ends a rollout: the ledger's last change counts.
    found.begin(second, quick(), "canary")
    found.tick()
    ledger = Ledger.open(settings)
    promotion.change(ledger, "promoted", pointer(settings).model_copy(update={"candidate": None}),
                     ledger.last("stable"))  # fmt: skip
    assert found.tick().why == "no rollout is under way" and share(settings) is None


def test_a_release_that_needs_a_person_waits_for_one(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    path = settings.root / "data/policies/approval.yaml"
    path.write_text(path.read_text().replace("approve_from: high", "approve_from: low"))
    found, ledger = controller(settings, engines), Ledger.open(settings)
    with pytest.raises(ApprovalError):
        found.begin(pair[1], quick(), "ab")
    (request,) = approvals.requests(ledger)
    token = approvals.token_of(settings, request)
    yes = approvals.answer(
        settings, ledger, request.seq, approve=True, name="Ann", reason="fine", token=token
    )
    traffic = Traffic(settings)
    traffic.answers(30)
    found.begin(pair[1], quick(), "ab")
    found.tick()
    found.tick()
    assert end(found, traffic).did == "promote"
    served = ledger.at(datetime.now(UTC))["stable"]
    assert served.pointer.release == pair[1] and served.approval == yes


def test_two_controllers_do_everything_once(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    one, traffic = begun(settings, pair, engines)
    other = controller(settings, engines)
    with one._alone() as mine:
        assert mine and other.tick().why == "another controller is at work"
    traffic.answers(60)
    # Both have decided on the same row; the lock is as good as gone.
    rollout = read(Ledger.open(settings), "stable")
    assert rollout is not None
    assert one._judge(rollout).did == "forward"
    with pytest.raises(ConflictError):
        other._judge(rollout)
    assert share(settings) == 0.5


def test_a_new_controller_counts_what_the_old_one_did(
    settings: Settings, pair: tuple[str, str], engines: FileEngines
) -> None:
    """Read in pieces, from journals and Parquet, or all at once: the counts are the same."""
    found, traffic = begun(settings, pair, engines, requests=10**9)
    for n in range(6):
        traffic.answers(7, ttft_ms=900.0 if n % 2 else 5.0)
        found.look()
        if n % 3 == 2:
            traffic.roll()
    old = found.look()[1]
    new = controller(settings, engines).look()[1]
    assert old is not None and new is not None and old == new
    assert sum(f.candidate is not None for f in old.findings) == len(old.findings)


# -- killed at any line --------------------------------------------------------------------------


def _killed_after(lines: int, work: Any) -> bool:
    """Do ``work`` in a child that ends, as by SIGKILL, before the so-manieth line of the
    controller; whether it came to its end instead."""
    pid = os.fork()
    if pid == 0:
        left = [lines]

        def trace(frame: Any, event: str, arg: object) -> Any:
            if frame.f_code.co_filename not in (module.__file__, promotion.__file__):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
            return trace

        try:
            sys.settrace(trace)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), "the work itself failed"
    return code == 0


def whole(settings: Settings, engines: FileEngines) -> None:
    """Ledger, pointer and engines agree."""
    ledger = Ledger.open(settings)
    assert ledger.verify() == []
    last = ledger.last("stable")
    assert last is not None and last.pointer is not None
    said = pointer(settings)
    assert (said.release, said.candidate) == (last.pointer.release, last.pointer.candidate)
    assert said.release in engines.running()
    assert said.candidate is None or said.candidate.release in engines.running()


#: Before the tick that is killed: answers of the traffic, and ticks, in turn. Then where it leads.
KILLS: dict[str, tuple[list[int], dict[str, Any], bool]] = {
    "observe": ([30], {}, True),
    "first step": ([30, -1], {}, True),
    "promote": ([30, -2, 60, -1, 400], {}, True),
    "back": ([30, -2, 60], {"ttft_ms": 900.0}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", KILLS)
def test_killed_at_any_line_the_rollout_goes_on_or_is_taken_back(tmp_path: Path, step: str) -> None:
    """One tick is killed before its first, second ... last line, each in a state of its own; a new
    controller then comes to the end that it would have come to."""
    before, harm, good = KILLS[step]
    template = tmp_path / "template"
    settings, pair, engines = _checkout(template)
    found, traffic = controller(settings, engines), Traffic(settings)
    found.begin(pair[1], quick(), "canary" if len(before) > 2 else "ab")  # ab: fewer ticks to go
    for count in before:
        if count > 0:
            traffic.answers(count, **harm)
        for _ in range(-count):
            found.tick()
    traffic.roll()
    lines, done = 0, False
    while not done:
        root = tmp_path / str(lines)
        shutil.copytree(template, root)
        settings = Settings.from_env({"RATCHET_ROOT": str(root)})
        engines = FileEngines(settings)
        done = _killed_after(lines, controller(settings, engines).tick)
        _finish(settings, engines, harm)
        assert pointer(settings).release == pair[good] and pointer(settings).candidate is None
        assert engines.running() == {pair[good]}
        shutil.rmtree(root)
        lines += 1
    assert lines > 30  # the trace saw the controller


def _checkout(root: Path) -> tuple[Settings, tuple[str, str], FileEngines]:
    root.mkdir()
    settings = Settings.from_env({"RATCHET_ROOT": str(root)})
    pair = install(settings, "one"), install(settings, "two")
    deployed(settings, pair[0])
    engines = FileEngines(settings)
    engines.start(pair[0])
    return settings, pair, engines


def _finish(settings: Settings, engines: FileEngines, harm: dict[str, Any]) -> None:
    """A new controller goes on to the end; at every moment everything agrees."""
    fresh, traffic = controller(settings, engines), Traffic(settings)
    for _ in range(12):
        report = fresh.tick()
        whole(settings, engines)
        if report.why == "no rollout is under way":
            return
        if report.rollout is not None and report.rollout.step and report.open:
            traffic.answers(200, **harm)
    raise AssertionError(report)
