"""Deployments: real processes and real records, with a stand-in where vLLM would be imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import GateError, InputError, NotFoundError, RatchetError, ServiceError
from contracts.settings import ROOT, Settings
from resources import releases
from resources.rag import Rag
from serving.deploy.__main__ import main
from serving.deploy.deployment import Deployer, Patience
from serving.engines import probe
from serving.engines.record import EngineRecord, list_records, read_record, stop
from tests.serving.conftest import until
from tests.serving.factory import LAUNCH, JsonIndex, LengthEmbedder, build

FAKE = Path(__file__).with_name("fake_vllm")


def open_json_rag(installed: releases.Installed) -> Rag:
    return Rag(
        JsonIndex(installed.index), LengthEmbedder(), installed.prompt(), top_k=3, min_score=-1
    )


@pytest.fixture
def deployer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployer]:
    """Deploys into the test's checkout; every engine is ended afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setattr("serving.deploy.engines.SWITCH_SECONDS", 0.0)
    copy_policy(settings.root)
    yield Deployer(settings, lambda _: None, Patience(ready=20, drain=1), open_json_rag)
    for record in list_records(settings.engines_dir):
        stop(record, 1)


def copy_policy(root: Path) -> None:
    """The repository's approval policy, which every checkout has."""
    folder = root / "data" / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data" / "policies" / "approval.yaml", folder)


def make(settings: Settings, mark: str = "one", how: str = "", **changes: Any) -> Path:
    """A release file in a checkout of its own, its engine failing as ``how`` says."""
    root = settings.root / mark
    path = build(root, mark, **changes)
    copy_policy(root)
    if how:
        (root / "data/bundle/launch.json").write_text(
            json.dumps({**LAUNCH, "env": {"FAKE_VLLM": how}})
        )
        path = _again(root)
    return path


def _again(root: Path) -> Path:
    """The release of ``root`` once more, after its bundle was changed."""
    from contracts.digests import path_md5, path_size
    from contracts.records import Release

    path = root / "data/release.json"
    body = json.loads(path.read_text())
    bundle = root / "data/bundle"
    body["members"]["bundle"] |= {"md5": path_md5(bundle), "size": path_size(bundle)}
    body["id"] = Release.compute_id(body)
    path.write_text(json.dumps(body))
    return path


def up(deployer: Deployer, path: Path) -> dict[str, Any]:
    return deployer.up(str(path), "stable", path.parents[1])


def engines(settings: Settings) -> list[str]:
    """Releases whose engine is on record and alive."""
    return [record.release for record in list_records(settings.engines_dir) if record.alive]


def test_the_life_of_a_channel(deployer: Deployer, settings: Settings) -> None:
    """First deployment, the same again, a second release, rollback by id, and down."""
    first = up(deployer, make(settings, "one"))
    assert first["changed"] and first["previous"] is None
    assert probe.healthy(first["engine_url"])
    channel = releases.read_channel(settings, "stable")
    assert channel is not None and channel.release == first["release"]

    same = up(deployer, settings.root / "one/data/release.json")
    assert not same["changed"] and same["pid"] == first["pid"]

    second = up(deployer, make(settings, "two"))
    assert second["changed"] and second["previous"] == first["release"]
    assert not probe.healthy(first["engine_url"])
    assert engines(settings) == [second["release"]]

    back = deployer.up(first["release"], "stable", settings.root)
    assert back["release"] == first["release"] and back["previous"] == second["release"]
    assert engines(settings) == [first["release"]]

    status = deployer.status()
    assert status["channels"][0]["healthy"] and len(status["installed"]) == 2
    assert deployer.down(None) == {"stopped": [first["release"]]}
    assert engines(settings) == [] and releases.read_channel(settings, "stable") is not None


@pytest.mark.slow
def test_a_killed_engine_is_brought_back_and_the_way_back_is_kept(
    deployer: Deployer, settings: Settings
) -> None:
    first = up(deployer, make(settings, "one"))
    second = up(deployer, make(settings, "two"))
    record = read_record(settings.engines_dir / f"{second['release']}.json")
    assert record is not None
    for pid in (record.pid, record.engine_pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not record.alive)
    again = deployer.ensure(None)["channels"]["stable"]
    assert again["changed"] and again["pid"] != second["pid"]
    assert again["previous"] == first["release"]
    assert probe.healthy(again["engine_url"])
    assert record.leftovers() == []  # the orphan of the killed engine went
    assert deployer.ensure("stable")["channels"]["stable"]["changed"] is False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "no-token"])
def test_a_release_whose_engine_fails_leaves_the_old_one_serving(
    deployer: Deployer, settings: Settings, how: str
) -> None:
    first = up(deployer, make(settings, "one"))
    hasty = Deployer(settings, lambda _: None, Patience(ready=1.5), open_json_rag)
    with pytest.raises(ServiceError, match="did not start") as error:
        up(hasty, make(settings, "bad", how))
    assert "weights are missing" in str(error.value) or "without producing" in str(error.value)
    channel = releases.read_channel(settings, "stable")
    assert channel is not None and channel.release == first["release"]
    assert engines(settings) == [first["release"]] and probe.healthy(first["engine_url"])


@pytest.mark.slow
def test_a_health_check_that_fails_stops_the_new_engine(
    deployer: Deployer, settings: Settings
) -> None:
    first = up(deployer, make(settings, "one"))

    def no_rag(installed: releases.Installed) -> Rag:
        raise OSError("the index is torn")

    picky = Deployer(settings, lambda _: None, Patience(ready=20), no_rag)
    with pytest.raises(ServiceError, match="the index is torn"):
        up(picky, make(settings, "two"))
    assert engines(settings) == [first["release"]]


def test_what_is_not_certified_or_not_itself_is_refused(
    deployer: Deployer, settings: Settings
) -> None:
    with pytest.raises(GateError, match="FAIL"):
        up(deployer, make(settings, "failed", gate={"verdict": "FAIL"}))
    with pytest.raises(GateError, match="None"):
        up(deployer, make(settings, "none", gate={}))
    edited = make(settings, "edited")
    body = json.loads(edited.read_text())
    edited.write_text(json.dumps({**body, "git_commit": "1" * 40}))
    with pytest.raises(InputError, match="edited after it was made"):
        up(deployer, edited)
    torn = make(settings, "torn")
    (settings.root / "torn/data/index/chunks.json").write_text("[]")
    with pytest.raises(InputError, match="not what release"):
        up(deployer, torn)
    with pytest.raises(NotFoundError, match="not installed"):
        deployer.up("0" * 16, "stable", settings.root)
    with pytest.raises(InputError, match="not a channel name"):
        deployer.up("0" * 16, "../x", settings.root)
    with pytest.raises(ServiceError, match="Nothing was ever deployed"):
        deployer.ensure("stable")
    assert releases.list_channels(settings) == [] and engines(settings) == []


def deploying(settings: Settings, release: Path) -> subprocess.Popen[str]:
    """A deployment in a process of its own; its engine never gets ready."""
    environ = {**os.environ, "RATCHET_ROOT": str(release.parents[1]),
               "RATCHET_STATE_DIR": str(settings.state_dir)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "serving.deploy", "up", "--release", str(release)],
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_killed_deployment_is_cleaned_up_by_the_next(
    deployer: Deployer, settings: Settings
) -> None:
    first = up(deployer, make(settings, "one"))
    process = deploying(settings, make(settings, "stuck", "never-ready"))

    def started() -> EngineRecord | None:
        found = list_records(settings.engines_dir)
        return next((r for r in found if r.state == "starting" and r.engine_pid), None)

    record = until(started, 20)
    with pytest.raises(ServiceError, match="Another deployment is running") as error:
        up(deployer, settings.root / "one/data/release.json")
    assert str(process.pid) in str(error.value)
    process.kill()
    process.communicate()
    assert record.alive  # it is nobody's child now, and on record
    channel = releases.read_channel(settings, "stable")
    assert channel is not None and channel.release == first["release"]
    assert up(deployer, settings.root / "one/data/release.json")["changed"] is False
    assert not record.alive and record.leftovers() == []


@pytest.mark.slow
def test_an_interrupted_deployment_takes_its_engine_along(
    deployer: Deployer, settings: Settings
) -> None:
    process = deploying(settings, make(settings, "stuck", "never-ready"))
    record = until(lambda: next(iter(list_records(settings.engines_dir)), None), 20)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "") and "interrupted" in said
    until(lambda: not record.alive)
    assert engines(settings) == []


def test_the_command_prints_one_line_of_json(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == 0
    assert json.loads(capsys.readouterr().out) == {"channels": [], "engines": [], "installed": []}
    assert main(["down", "--all"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": []}
    assert main(["up", "--release", "no/such.json"]) == RatchetError.exit_code
    shown = capsys.readouterr()
    assert shown.out == "" and "The release file does not exist." in shown.err


@pytest.mark.slow
def test_a_damaged_pointer_is_said_and_written_anew(settings: Settings, deployer: Deployer) -> None:
    path = releases.channel_path(settings, "stable")
    path.parent.mkdir(parents=True)
    path.write_text("{half")
    begun = time.monotonic()
    result = up(deployer, make(settings, "one"))
    assert result["changed"] and time.monotonic() - begun < 20
    assert releases.read_channel(settings, "stable") is not None
