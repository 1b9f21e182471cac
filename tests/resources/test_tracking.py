"""The spool and MLflow, with a real SQLite store (built once per session and copied)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.exceptions import MlflowException

from contracts.digests import path_md5
from contracts.errors import NotFoundError
from contracts.records import Channel, Member, Release
from contracts.settings import ROOT, Settings
from resources import promotion, prompts, registry, spool, tracking
from resources.ledger import Ledger
from resources.prompt_registry import mirror

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


@pytest.mark.parametrize("error", [None, "The gate says FAIL."])
def test_the_page_of_a_stage_is_an_artifact_of_its_run(
    settings: Settings, store: tracking.Tracking, error: str | None
) -> None:
    """That of the output which DVC has; of a refused one, what the stage kept."""
    folder = settings.root / "data" / "gate"
    kept = settings.state_dir / "refused" / "gate"
    for place, text in ((folder, "<h1>PASS</h1>"), (kept, "<h1>FAIL</h1>")):
        place.mkdir(parents=True)
        (place / "report.html").write_text(text)
    outs = [{"path": "data/gate", "md5": path_md5(folder)}]
    lock = {"stages": {"gate": {"cmd": "c", "outs": outs}}}
    (settings.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    spool.record(
        stage="gate", started=1.7e9, seconds=1.0, params={}, metrics={}, paths={}, error=error
    )
    assert tracking.flush(settings, store) == (1, 0)
    (run,) = store.find("tags.`ratchet.stage` = 'gate'")
    assert run.data.tags["ratchet.report"] == "report.html"
    page = store.client.download_artifacts(run.info.run_id, "report.html")
    assert Path(page).read_text() == ("<h1>FAIL</h1>" if error else "<h1>PASS</h1>")


def test_the_page_of_another_execution_is_not_logged(
    settings: Settings, store: tracking.Tracking
) -> None:
    (settings.root / "data" / "gate").mkdir(parents=True)
    (settings.root / "data" / "gate" / "report.html").write_text("of a later run")
    lock = {"stages": {"gate": {"cmd": "c", "outs": [{"path": "data/gate", "md5": "3" * 32}]}}}
    (settings.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    spool.record(
        stage="gate", started=1.7e9, seconds=1.0, params={}, metrics={}, paths={}, error=None
    )
    assert tracking.flush(settings, store) == (1, 0)
    (run,) = store.find("tags.`ratchet.stage` = 'gate'")
    assert "ratchet.report" not in run.data.tags
    assert store.client.list_artifacts(run.info.run_id) == []


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


def registrable(release_id: str) -> Release:
    members = {
        name: Member(path=name, md5="0" * 32, size=1)
        for name in ("bundle", "adapter", "base_model")
    }
    return Release(
        id=release_id, members=members, model={},
        prompt={"name": "answer", "version": "v1", "sha256": "0" * 64},
        gate={"verdict": "PASS", "policy_sha256": "0" * 64}, eval_set="", params={}, git_commit="c",
    )  # fmt: skip


def serve(ledger: Ledger, release_id: str) -> None:
    last = ledger.last("stable")
    pointer = Channel(name="stable", release=release_id, engine_url="http://e", model="m")
    promotion.change(ledger, "promoted", pointer, last)


def test_a_release_is_registered_once_and_aliases_follow_the_ledger(
    settings: Settings, store: tracking.Tracking
) -> None:
    ledger = Ledger.open(settings)
    one, two, three = (registrable(letter * 16) for letter in "abc")

    def aliases() -> dict[str, str]:
        names = ("candidate", "stable")
        found = ((name, registry._release_at(name, store.client)) for name in names)
        return {name: release for name, release in found if release}

    assert registry.register(one, settings) == registry.register(one, settings) == "1"
    assert registry.follow(settings, ledger) == [] and aliases() == {}  # never before the row
    promotion.record_verdict(ledger, one)
    assert registry.follow(settings, ledger) == [f"MLflow's alias candidate: none -> {one.id}"]
    serve(ledger, one.id)
    registry.follow(settings, ledger)
    assert registry.register(two, settings) == "2"
    assert aliases() == {"candidate": one.id, "stable": one.id}
    promotion.record_verdict(ledger, two, newest=True)
    assert len(registry.follow(settings, ledger)) == 1
    assert aliases() == {"candidate": two.id, "stable": one.id}
    promotion.record_verdict(ledger, one)  # promoted again: the candidate stays
    assert registry.follow(settings, ledger) == []
    promotion.record_verdict(ledger, one, newest=True)  # built again: it is the candidate
    registry.follow(settings, ledger)
    assert aliases() == {"candidate": one.id, "stable": one.id}

    store.client.set_registered_model_alias(registry.MODEL, "stable", "2")  # by hand
    assert registry.follow(settings, ledger) == [f"MLflow's alias stable: {two.id} -> {one.id}"]
    assert registry.follow(settings, ledger) == [] and aliases()["stable"] == one.id
    serve(ledger, three.id)  # which is neither registered nor installed here
    (said,) = registry.follow(settings, ledger)
    assert "is removed: the ledger says cccc" in said and aliases() == {"candidate": one.id}


TEMPLATE = (
    "{% block system %}{% for p in passages %}{{ p.text }}{% endfor %}{% endblock %}"
    "{% block user %}{{ question }} MARK{% endblock %}"
)


def released(settings: Settings, tags: str, **versions: str) -> Release:
    """A release whose prompts lie in the checkout: ``versions`` by name, texts by their mark."""
    home = settings.root / "prompts" / "answer"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name, mark in versions.items():
        (home / f"{name}.jinja2").write_text(TEMPLATE.replace("MARK", mark))
    (home / "tags.yaml").write_text(tags)
    path = settings.root / "prompts.json"
    path.write_text(json.dumps(prompts.load(home.parent).to_json()))
    members = {"prompts": Member(path="prompts.json", md5=path_md5(path), size=1)}
    return Release(
        id="a" * 16, members=members, prompt={"name": "answer", "version": "v1"}, model={}, gate={},
        eval_set="", params={}, git_commit="c" * 40,
    )  # fmt: skip


def test_prompts_are_mirrored_once_and_aliases_follow_the_tags(
    settings: Settings, store: tracking.Tracking
) -> None:
    settings = replace(settings, tracking=True)
    client = store.client
    first = released(settings, "stable: v1\n", v1="one")
    assert str(mirror(first, settings)) == "answer/v1; answer/stable -> v1"
    assert str(mirror(first, settings)) == "nothing new"
    second = released(settings, "stable: v1\ncanary: v2\n", v1="one", v2="two")
    assert str(mirror(second, settings)) == "answer/v2; answer/canary -> v2"
    canary = client.get_prompt_version_by_alias("ratchet-answer", "canary")
    assert canary.template == TEMPLATE.replace("MARK", "two")
    assert canary.tags["ratchet.version"] == "v2" and "a" * 16 in canary.commit_message
    # What is done by hand in MLflow does not lead: it is put back.
    client.register_prompt("ratchet-answer", "by hand")
    client.set_prompt_alias("ratchet-answer", "stable", 3)
    client.set_prompt_alias("ratchet-answer", "mine", 3)
    third = released(settings, "stable: v2\n", v1="one", v2="two")
    done = mirror(third, settings)
    assert done.registered == [] and done.problem is None
    assert done.aliases == [
        "answer/canary removed", "answer/mine removed", "answer/stable -> v2",
    ]  # fmt: skip
    aliases = {n: client.get_prompt_version("ratchet-answer", n).aliases for n in (1, 2, 3)}
    assert aliases == {1: [], 2: ["stable"], 3: []}
    # The same name with another text is another version; nothing that was registered changes.
    fourth = released(settings, "stable: v1\n", v1="other", v2="two")
    assert mirror(fourth, settings).registered == ["answer/v1"]
    assert client.get_prompt_version("ratchet-answer", 1).template == TEMPLATE.replace(
        "MARK", "one"
    )
    stable = client.get_prompt_version_by_alias("ratchet-answer", "stable")
    assert stable.template == TEMPLATE.replace("MARK", "other")


def test_what_mlflow_did_not_take_is_caught_up(
    settings: Settings, store: tracking.Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, tracking=True)
    release = released(settings, "stable: v1\n", v1="one", v2="two")
    off = mirror(release, replace(settings, tracking=False))
    assert "RATCHET_TRACKING=off" in str(off)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound and not listening: nobody answers here
        taken.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{taken.getsockname()[1]}"
        problem = mirror(release, replace(settings, mlflow_uri=down)).problem
    assert problem is not None and "does not answer" in problem
    # Half-way: the second version is refused.
    real, given = store.client.__class__.register_prompt, []

    def once(self: Any, *args: Any, **more: Any) -> Any:
        given.append(args)
        if len(given) > 1:
            raise MlflowException("the disk is full")
        return real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(store.client.__class__, "register_prompt", once)
        half = mirror(release, settings)
    assert half.registered == ["answer/v1"] and "the disk is full" in str(half)
    assert str(mirror(release, settings)) == "answer/v2; answer/stable -> v1"
    (settings.root / "prompts.json").write_text("{}")
    assert "neither in the workspace nor in DVC's cache" in str(mirror(release, settings))


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
