"""The whole thing, small and real."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from contracts.digests import path_md5
from contracts.records import REFUSAL, Release
from contracts.settings import ROOT
from pipelines import trace
from resources.judging.calibration import calibrate, read_labels, uncalibrated
from resources.judging.judge import Endpoint, judged
from resources.tracking import Tracking, pending
from tests.e2e.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def until(true: Callable[[], Any], seconds: float = 30) -> Any:
    """Poll until ``true()`` is truthy; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def test_the_release_names_everything_by_digest(lifecycle: Workspace) -> None:
    body = json.loads((lifecycle.root / "data/release.json").read_text())
    release = Release.model_validate(body)
    assert release.id == Release.compute_id(body)
    assert release.gate["verdict"] == "PASS"
    for member in release.members.values():
        assert path_md5(lifecycle.root / member.path) == member.md5, member.path


def test_dvc_agrees_that_all_is_done(lifecycle: Workspace) -> None:
    """But for the gate, which a new stable release awaits, and what the job leaves out."""
    changed = json.loads(lifecycle.run("dvc", "status", "--json").stdout)
    assert set(changed) <= {"gate", "index_sweep"}
    before = (lifecycle.root / "data/release.json").read_bytes()
    result = lifecycle.run("dvc", "repro")
    assert "Running stage 'gate'" in result.stdout or not changed
    assert "Running stage 'bundle'" not in result.stdout
    assert (lifecycle.root / "data/release.json").read_bytes() == before
    assert json.loads(lifecycle.run("dvc", "status", "--json").stdout) == {}


def test_a_release_is_built_again_from_git_and_dvc_alone(lifecycle: Workspace) -> None:
    """Fresh checkout, `dvc pull`, `dvc repro` does nothing, ids equal."""
    release = json.loads((lifecycle.root / "data/release.json").read_text())
    refused = lifecycle.run("pipelines.cli", "release", "reproduce", check=False)
    assert "commit dvc.lock" in refused.stderr  # what is not in git cannot be built again
    lifecycle.run("dvc", "repro", "release")  # the gate, which the new stable release made stale
    lifecycle.git("add", "-A")
    lifecycle.git("commit", "-qm", "the lock of a release")
    found = json.loads(lifecycle.run("pipelines.cli", "release", "reproduce", "--json").stdout)
    assert found["same"] and (found["stale"], found["wrong"]) == ([], [])
    assert found["release"] == found["found"] == release["id"]


def test_mlflow_has_a_nested_run_for_every_executed_stage(lifecycle: Workspace) -> None:
    tracking = Tracking(lifecycle.settings)
    lifecycle.run("pipelines.cli", "track")
    until(lambda: not pending(lifecycle.settings))
    runs = tracking.find("tags.`ratchet.kind` = 'stage'")
    stages = {run.data.tags["ratchet.stage"] for run in runs}
    assert {
        "documents",
        "quality",
        "chunks",
        "vectors",
        "index",
        "adapter",
        "gate",
        "release",
    } <= stages
    release_md5 = path_md5(lifecycle.root / "data/release.json")
    (run, *_) = tracking.stage_runs(release_md5)
    assert run.data.tags["dagster/run_id"]
    parent = tracking.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["dagster/run_id"] == run.data.tags["dagster/run_id"]
    version = tracking.client.get_model_version_by_alias("ratchet", "stable")
    body = json.loads((lifecycle.root / "data/release.json").read_text())
    assert version.tags["ratchet.release"] == body["id"]


def test_the_openai_client_works_unchanged(lifecycle: Workspace, gateway: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=gateway + "/v1", api_key="none", max_retries=0)
    assert "ratchet" in [model.id for model in client.models.list()]
    question: Any = [{"role": "user", "content": "What happens when a score is missing?"}]
    raw = client.chat.completions.with_raw_response.create(model="ratchet", messages=question)
    whole = raw.parse()
    body = json.loads((lifecycle.root / "data/release.json").read_text())
    assert raw.headers["x-ratchet-release"] == body["id"]
    answer = whole.choices[0].message.content
    assert answer
    stream = client.chat.completions.create(model="ratchet", messages=question, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == answer  # greedy: the same answer, in pieces
    if answer != REFUSAL:
        assert whole.model_extra and whole.model_extra["citations"]


def test_an_answer_walks_back_to_its_bytes(lifecycle: Workspace, gateway: str) -> None:
    asked = json.loads(
        lifecycle.run(
            "pipelines.cli", "ask", "What happens when a score is missing?", "--json"
        ).stdout
    )
    found = until(
        lambda: (
            lifecycle.run(
                "pipelines.cli", "trace", asked["response_id"], "--json", check=False
            ).stdout
        )
    )
    value = json.loads(found)
    assert value["release"]["id"] == asked["release"]
    assert value["members"]["adapter"]["mlflow_run"]
    assert value["members"]["adapter"]["dagster_run"]
    assert value["chunks"], "an answered question shows its passages"
    chunk = next(item for item in value["chunks"] if "file" in item)
    text = (lifecycle.root / chunk["file"]["path"]).read_text(encoding="utf-8")
    start, _, end = chunk["chunk_id"].rpartition("#")[2].partition("-")
    assert text[int(start) : int(end)].startswith(chunk["text"].removesuffix(" …"))
    assert chunk["file"]["bytes_in"] == "working tree"
    assert asked["response_id"] in trace.render(value)


def test_an_unknown_response_is_told(lifecycle: Workspace) -> None:
    result = lifecycle.run("pipelines.cli", "trace", "resp-nothing", check=False)
    assert result.returncode == 1
    assert "No response 'resp-nothing' in the request log" in result.stderr


def test_metrics_and_probes(gateway: str) -> None:
    for path in ("/healthz", "/readyz"):
        with urllib.request.urlopen(gateway + path, timeout=10) as response:
            assert response.status == 200
    with urllib.request.urlopen(gateway + "/metrics", timeout=10) as response:
        assert b"ratchet_" in response.read()


def test_a_day_is_evaluated(lifecycle: Workspace, gateway: str) -> None:
    lifecycle.run("pipelines.cli", "ask", "How is drift measured?")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    until(lambda: list((lifecycle.settings.requests_dir / day).glob("*.parquet")))
    lifecycle.job("nightly", day)
    folder = lifecycle.settings.monitoring_dir / day
    assert json.loads((folder / "requests.json").read_text())["requests"] >= 1
    assert json.loads((folder / "online_eval.json").read_text())
    # A handful of requests proves nothing, and the verdict says so.
    assert json.loads((folder / "drift.json").read_text())["verdict"] == "no_verdict"


def test_a_model_that_cannot_judge_is_found_out(lifecycle: Workspace, tmp_path: Path) -> None:
    """The release's own engine as judge, its answers held to the schema: nano writes what was asked
    for, says it badly or goes on until it is cut off, and agrees with people no more than chance
    does."""
    channel = json.loads((lifecycle.settings.channels_dir / "stable.json").read_text())
    recording = (ROOT / "tests/resources/judge_recording.jsonl").read_text().splitlines()[:8]
    labels = tmp_path / "labels.jsonl"
    fields = ("question", "first", "second", "better")
    rows = [{name: json.loads(line)[name] for name in fields} for line in recording]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = read_labels(labels)
    endpoint = Endpoint(channel["engine_url"], channel["model"], deadline=300)
    (made,) = judged(endpoint, tmp_path, lambda judge: calibrate(judge, known))
    assert made.n == 8 and set(made.invalid) <= {"cut_off", "wrong_form"}
    assert made.served in ([], [channel["model"]])
    assert "is not shown to reach" in (uncalibrated(made, 0.4) or "")


def test_status_shows_what_serves(lifecycle: Workspace, gateway: str) -> None:
    value = json.loads(lifecycle.run("pipelines.cli", "status", "--json").stdout)
    assert value["channels"]["stable"]["release"] == value["release"]["id"]
    assert value["channels"]["stable"]["engine_up"] is True
    assert value["services"]["gateway"]["up"] is True
    assert value["published_index"]["md5"] == path_md5(lifecycle.root / "data/index")
