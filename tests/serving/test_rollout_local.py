"""Rollouts over engines that are real processes (with a stand-in where vLLM would be imported),
and the commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError
from contracts.settings import ROOT, Settings
from resources import releases
from resources.ledger import Ledger
from serving.deploy.candidate import CandidateEngines
from serving.deploy.deployment import Patience
from serving.engines import probe
from serving.engines.record import list_records, read_record, stop
from serving.rollout import policy
from serving.rollout.__main__ import main
from serving.rollout.controller import Controller
from serving.rollout.engines import Busy
from tests.serving.conftest import until
from tests.serving.rollouts import FileEngines, Traffic, controller, deployed, install, quick
from tests.serving.test_deploy import FAKE, make, open_json_rag, up


@pytest.fixture
def engines(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[CandidateEngines]:
    """Every engine is ended afterwards."""
    policies = settings.root / "data" / "policies"
    policies.mkdir(parents=True)
    shutil.copy(ROOT / "data" / "policies" / "approval.yaml", policies)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setattr("serving.deploy.engines.SWITCH_SECONDS", 0.0)
    yield CandidateEngines(settings, lambda _: None, Patience(ready=20, drain=1), open_json_rag)
    for record in list_records(settings.engines_dir):
        stop(record, 1)


def alive(settings: Settings) -> set[str]:
    return {record.release for record in list_records(settings.engines_dir) if record.alive}


@pytest.mark.slow
def test_processes_come_and_go_with_the_rollout(
    engines: CandidateEngines, settings: Settings
) -> None:
    """Taken back when its engine is killed; promoted with the same engine; nothing is left over."""
    first = up(engines, make(settings, "one"))["release"]
    path = make(settings, "two")
    releases.install(path, path.parents[1], settings)
    second = releases.read_release(path).id
    found, traffic = Controller(settings, "stable", engines, engines.ledger), Traffic(settings)
    traffic.answers(30)
    found.begin(second, quick(), "canary")
    assert alive(settings) == {first}
    assert found.tick().did == "observe" and alive(settings) == {first, second}
    pointer = releases.read_channel(settings, "stable")
    assert pointer is not None and pointer.candidate is not None
    assert probe.healthy(pointer.candidate.engine_url) and probe.healthy(pointer.engine_url)
    assert found.tick().did == "forward"

    record = read_record(settings.engines_dir / f"{second}.json")
    assert record is not None
    for pid in (record.pid, record.engine_pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not record.alive)
    assert found.tick().did == "back"
    found.tick()
    assert alive(settings) == {first} and list_records(settings.engines_dir)[0].release == first

    found.begin(second, quick(), "ab")
    assert [found.tick().did for _ in range(2)] == ["observe", "forward"]
    for _ in range(20):
        traffic.answers(40, answer="Fact 1 of two [1]")
        report = found.tick()
        if report.did != "nothing":
            break
    # Its chunks cannot be read here, so its quality is never shown.
    assert report.did == "nothing" and "quality" in report.why
    found.abort("enough")
    with engines._alone("somebody else deploys"):
        with pytest.raises(Busy):
            engines.start(second)
        found.tick()
        assert alive(settings) == {first, second}  # whoever deploys ends engines now
    found.tick()
    assert alive(settings) == {first}


@pytest.mark.slow
def test_the_candidates_engine_goes_on_when_it_is_promoted(
    engines: CandidateEngines, settings: Settings
) -> None:
    first = up(engines, make(settings, "one"))["release"]
    path = make(settings, "two")
    releases.install(path, path.parents[1], settings)
    second = releases.read_release(path).id
    found, traffic = Controller(settings, "stable", engines, engines.ledger), Traffic(settings)
    traffic.answers(30)
    found.begin(second, quick(), "ab")
    assert [found.tick().did for _ in range(2)] == ["observe", "forward"]
    url = releases.read_channel(settings, "stable").candidate.engine_url  # type: ignore[union-attr]
    found._ledger.append(  # as the controller does it when everything is shown
        "promoted", channel="stable", release=second, after=found._ledger.last("stable").seq,  # type: ignore[union-attr]
        body={
            "channel": {"name": "stable", "release": second, "engine_url": url, "model": "nano",
                        "previous": first},
            "rollout": {"action": "promote"},
        },
    )  # fmt: skip
    found.tick()  # follows the row, and ends what nobody names
    pointer = releases.read_channel(settings, "stable")
    assert pointer is not None and (pointer.release, pointer.engine_url) == (second, url)
    assert alive(settings) == {second} and probe.healthy(url)


# -- commands ------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_commands(settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = install(settings, "one"), install(settings, "two")
    deployed(settings, first)
    rules = tmp_path / "rules.yaml"
    rules.write_text("strategy: shadow\n")
    assert main(["status"]) == 0
    assert said(capsys) == {"channel": "stable", "rollout": None, "last": None}
    assert main(["start", "--release", second, "--policy", str(rules), "--reason", "r"]) == 0
    begun = said(capsys)
    assert (begun["release"], begun["strategy"]) == (second, "shadow")
    assert main(["start", "--release", second, "--policy", str(rules)]) == 4
    assert "is under way" in capsys.readouterr().err
    assert main(["status"]) == 0
    assert said(capsys)["rollout"]["step"] == 0
    assert main(["abort", "--reason", "no"]) == 0
    capsys.readouterr()
    assert main(["abort", "--reason", "no"]) == 1 and main(["status"]) == 0
    last = said(capsys)["last"]
    assert (last["did"], last["why"], last["release"]) == ("back", "no", first)
    assert main(["tick"]) == 0 and said(capsys)["why"] == "no rollout is under way"
    row = Ledger.open(settings).entries(kinds=("rollout",))[0]
    assert row.body["rollout"]["policy_digest"] == policy.load(rules).digest


def test_the_watcher_takes_a_candidate_back_while_nobody_looks(settings: Settings) -> None:
    """A process of its own, as `ratchet up` runs it, over the real ledger, log and pointer."""
    first, second = install(settings, "one"), install(settings, "two")
    deployed(settings, first)
    found = controller(settings, FileEngines(settings))
    found.begin(second, quick(), "canary")
    found.tick()
    watch = subprocess.Popen(
        [sys.executable, "-m", "serving.rollout", "watch", "--until-end"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # The engines of this test are no processes, so the watcher finds the candidate's gone.
        out, _ = watch.communicate(timeout=60)
    finally:
        watch.kill()
        watch.wait()
    assert json.loads(out)["did"] == "back" and watch.returncode == 0
    pointer = releases.read_channel(settings, "stable")
    assert pointer is not None and pointer.candidate is None
    last = Ledger.open(settings).last("stable")
    assert last is not None and "does not run" in last.reason


def test_the_shipped_policy_is_the_default_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    assert policy.load(ROOT / policy.PATH) == policy.Policy()
    for text, place in {
        "canary: [{share: 0.5, answers: 9}, {share: 0.2, answers: 9}]": "larger share",
        "ab: {share: 1.0, answers: 9}": "leaves no answers",
        "alpha: 2": "alpha",
        "metrics: {speed: {margin: 0.1}}": "metrics.speed",
    }.items():
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            policy.load(path)
        assert place in str(error.value)
    with pytest.raises(ConfigError, match="does not exist"):
        policy.load(tmp_path / "none.yaml")
