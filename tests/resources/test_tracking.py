"""The spool and MLflow, with a real SQLite store (built once per session and copied)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from contracts.digests import path_md5
from contracts.errors import NotFoundError
from contracts.records import Member, Release
from contracts.settings import ROOT, Settings
from resources import spool, tracking

pytestmark = pytest.mark.slow  # MLflow's import and migrations cost 10 CPU seconds


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mlflow")
    tracking.Tracking(
        Settings.from_env({"RATCHET_STATE_DIR": str(home), "RATCHET_ROOT": str(home)})
    )
    return home / "mlflow.db"


@pytest.fixture
def store(settings: Settings, template: Path) -> tracking.Tracking:
    settings.state_dir.mkdir(exist_ok=True)
    shutil.copy(template, settings.state_dir / "mlflow.db")
    return tracking.Tracking(settings)


@pytest.fixture
def executed(settings: Settings) -> Settings:
    """One execution of `chunks` in the spool, and the lock entry that DVC wrote for it."""
    (settings.root / "chunks.txt").write_text("x")
    md5 = path_md5(settings.root / "chunks.txt")
    lock = {
        "stages": {
            "chunks": {
                "cmd": "c",
                "deps": [{"path": "in", "md5": "1" * 32 + ".dir"}],
                "outs": [
                    {"path": "chunks.txt", "md5": md5},
                    {"path": "data/metrics/chunks.json", "md5": "2" * 32},
                ],
            }
        }
    }
    (settings.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    record(error=None)
    return settings


def record(error: str | None) -> None:
    spool.record(
        stage="chunks", started=1.7e9, seconds=2.5, params={"max_tokens": 128, "deep": {"a": [1]}},
        metrics={"chunks": 12.0}, paths={"out": "chunks.txt"}, error=error,
    )  # fmt: skip


def test_an_execution_becomes_a_nested_run_with_dvc_digests(
    executed: Settings, store: tracking.Tracking
) -> None:
    assert tracking.flush(executed, store) == (1, 0)
    assert tracking.pending(executed) == []
    md5 = path_md5(executed.root / "chunks.txt")
    (run,) = store.stage_runs(md5)
    assert run.data.params == {"max_tokens": "128", "deep.a": "[1]"}
    assert run.data.metrics["chunks"] == 12.0
    assert run.info.status == "FINISHED"
    contexts = {(item.tags[0].value, item.dataset.digest) for item in run.inputs.dataset_inputs}
    assert contexts == {("input", "1" * 32 + ".dir"), ("output", md5), ("output", "2" * 32)}
    assert run.data.tags["ratchet.out"] == "chunks.txt"
    parent = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["ratchet.kind"] == "pipeline"


def test_a_digest_in_mlflow_resolves_to_the_bytes(
    executed: Settings, store: tracking.Tracking
) -> None:
    import mlflow.data

    tracking.flush(executed, store)
    tracking.register_source()
    (run,) = store.stage_runs(path_md5(executed.root / "chunks.txt"))
    output = next(i for i in run.inputs.dataset_inputs if i.tags[0].value == "output")
    source = mlflow.data.get_source(output)
    assert source.load(executed.root).read_text() == "x"
    (executed.root / "chunks.txt").write_text("changed")
    with pytest.raises(NotFoundError, match="neither in the workspace nor in DVC's cache"):
        source.load(executed.root)


def test_logged_twice_stands_once(executed: Settings, store: tracking.Tracking) -> None:
    """The crash between MLflow's answer and the removal of the record."""
    (path,) = tracking.pending(executed)
    kept = path.read_bytes()
    tracking.flush(executed, store)
    path.write_bytes(kept)
    tracking.flush(executed, store)
    assert len(store.find("tags.`ratchet.kind` = 'stage'")) == 1
    assert len(store.find("tags.`ratchet.kind` = 'pipeline'")) == 1


def test_a_failed_stage_is_a_failed_run_and_garbage_is_set_aside(
    executed: Settings, store: tracking.Tracking
) -> None:
    record(error="It broke.")
    (executed.spool_dir / "garbage.json").write_text("{")
    assert tracking.flush(executed, store) == (2, 0)
    failed = store.find("tags.`ratchet.error` = 'It broke.'")
    assert [run.info.status for run in failed] == ["FAILED"]
    assert [path.name for path in executed.spool_dir.glob("*.bad")] == ["garbage.bad"]


def test_a_running_dvc_is_waited_for(executed: Settings, store: tracking.Tracking) -> None:
    (path,) = tracking.pending(executed)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        value = tracking.read_record(path)
        assert value is not None
        path.write_text(
            value.model_copy(update={"process": f"{child.pid}-{ticks}"}).model_dump_json()
        )
        assert tracking.flush(executed, store) == (0, 1)
        child.communicate(b"\n")
    assert tracking.flush(executed, store) == (1, 0)


def test_a_release_is_registered_once_and_aliases_move(
    settings: Settings, store: tracking.Tracking
) -> None:
    from resources.registry import MODEL, register

    members = {
        name: Member(path=name, md5="0" * 32, size=1)
        for name in ("bundle", "adapter", "base_model")
    }
    release = Release(
        id="a" * 16, members=members, prompt={"name": "answer", "version": "v1"}, model={}, gate={},
        eval_set="", params={}, git_commit="c",
    )  # fmt: skip
    assert register(release, settings, "candidate") == "1"
    assert register(release, settings, "stable") == "1"
    assert register(release.model_copy(update={"id": "b" * 16}), settings, "candidate") == "2"
    stable = store.client.get_model_version_by_alias(MODEL, "stable")
    assert stable.tags["ratchet.release"] == "a" * 16


def test_without_tracking_nothing_is_spooled(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_TRACKING", "off")
    record(error=None)
    assert not settings.spool_dir.exists()


def test_two_processes_make_one_new_store(settings: Settings) -> None:
    """Both would migrate it; MLflow alone fails with "duplicate column name"."""
    code = (
        "from contracts.settings import Settings; from resources.tracking import Tracking;"
        "Tracking(Settings.from_env())"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], told
