"""One materialization: what it runs, what it reports, and what it leaves when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest
from dvc_fixture import (
    definitions,
    dvc_stale,
    edit,
    failure,
    git,
    make_project,
    materialize,
    metadata,
    repro,
)

from dagster_dvc import DvcProject, LocalRunner, Patience
from dagster_dvc.runner import decision

LOCAL = LocalRunner(Patience(busy=60.0))


@pytest.mark.parametrize(
    ("lines", "how"),
    [
        (["Stage 'x' didn't change, skipping", "Data and pipelines are up to date."], "unchanged"),
        (["Stage 'x' is cached - skipping run, checking out outputs"], "run_cache"),
        (["Running stage 'x':", "> cmd", "Stage 'x' didn't change, skipping"], "ran"),
        (["Pulling data for stage: 'x'"], "pulled"),
        (["Pulling data for stage: 'x'", "Running stage 'x':"], "ran"),
        (["Running stage 'xy':"], None),
        ([], None),
    ],
)
def test_dvcs_words_tell_what_it_decided(lines: list[str], how: str | None) -> None:
    assert decision("x", lines) == how


def test_a_materialization_runs_one_stage_and_reports_it(
    done: DvcProject, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(done.root / "code/merge.sh", "set -eu", "set -eu; echo working")
    result = materialize(definitions(done, LOCAL), instance, "merged")
    said = metadata(result)
    assert said["dvc/how"] == "ran"
    assert said["dvc/cmd"].startswith("sh code/merge.sh out/merged ")
    assert said["dvc/md5"] == done.lock()["merged"].outs["out/merged"].md5
    assert (said["dvc/bytes"], said["dvc/nfiles"]) == (40, 2)
    assert (said["metric/words"], said["metric/files.read"]) == (5, 2)
    assert said["dvc/duration_s"] > 0
    (event,) = result.get_asset_materialization_events()
    tags = event.materialization.tags or {}
    assert tags["dagster/data_version"] == done.data_version("merged") == said["dvc/md5"]
    assert tags["dagster/code_version"] == done.code_version("merged")
    assert "\nworking\n" in capfd.readouterr().out
    assert dvc_stale(done.root) == set()


@pytest.mark.slow
def test_how_follows_what_dvc_did(done: DvcProject, instance: dg.DagsterInstance) -> None:
    assets = definitions(done, LOCAL)
    assert metadata(materialize(assets, instance, "report"))["dvc/how"] == "unchanged"
    (done.root / "out/report.txt").unlink()
    assert metadata(materialize(assets, instance, "report"))["dvc/how"] == "run_cache"


@pytest.mark.slow
def test_the_stage_learns_run_partition_and_stage(
    project: DvcProject, instance: dg.DagsterInstance
) -> None:
    script = project.root / "code/words.sh"
    script.write_text(script.read_text() + "env | grep ^DAGSTER_DVC_ > env.txt\n")
    result = materialize(definitions(project, LOCAL), instance, "words", "b")
    lines = (project.root / "env.txt").read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert seen["DAGSTER_DVC_RUN_ID"] == result.run_id
    assert (seen["DAGSTER_DVC_PARTITION"], seen["DAGSTER_DVC_STAGE"]) == ("b", "words@b")


@pytest.mark.slow
def test_a_failed_stage_leaves_the_last_good_output_and_keeps_its_own(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    good = {path: path.read_bytes() for path in sorted((done.root / "out").rglob("*.*"))}
    lock = (done.root / "dvc.lock").read_bytes()
    edit(done.root / "code/merge.sh", "sort ", "echo bad > $target/words.txt; exit 3; sort ")
    result = materialize(definitions(done, LOCAL), instance, "merged", raise_on_error=False)
    assert not result.success
    error = failure(result)
    message = str(error.user_failure_data.description)
    for expected in (
        "'merged'",
        "its command failed",
        "sh code/merge.sh",
        "exit status",
        "dvc repro --single-item merged",
        "last good output is in place",
    ):
        assert expected in message, message
    assert {path: path.read_bytes() for path in good} == good
    assert (done.root / "dvc.lock").read_bytes() == lock
    assert dvc_stale(done.root) == {"merged"}
    kept = done.root / str(error.user_failure_data.metadata["dvc/failed_output"].value)
    assert (kept / "out/merged/words.txt").read_text() == "bad\n"
    assert "dvc/log_tail" in error.user_failure_data.metadata
    assert not (done.work_dir / "running.json").exists()

    edit(done.root / "code/merge.sh", "echo bad > $target/words.txt; exit 3; sort ", "sort ")
    again = materialize(definitions(done, LOCAL), instance, "merged")
    assert metadata(again)["dvc/how"] == "unchanged"


@pytest.mark.slow
def test_a_first_run_that_fails_leaves_nothing_in_the_outputs_place(
    project: DvcProject, instance: dg.DagsterInstance
) -> None:
    script = project.root / "code/words.sh"
    script.write_text(script.read_text() + "exit 4\n")
    result = materialize(definitions(project, LOCAL), instance, "words", "a", raise_on_error=False)
    assert not result.success
    assert not (project.root / "out/words/a.txt").exists()
    assert (project.work_dir / "failed/words@a/out/words/a.txt").read_text().startswith("ONE\n")


@pytest.mark.slow
def test_missing_inputs_come_from_the_cache(done: DvcProject, instance: dg.DagsterInstance) -> None:
    import shutil

    shutil.rmtree(done.root / "out/words")
    edit(done.root / "code/merge.sh", "set -eu", "set -e -u")
    said = metadata(materialize(definitions(done, LOCAL), instance, "merged"))
    assert said["dvc/how"] == "ran"
    assert said["dvc/fetched_inputs"] == ["out/words/a.txt", "out/words/b.txt"]


def test_inputs_that_cannot_be_had_are_all_named(
    project: DvcProject, instance: dg.DagsterInstance
) -> None:
    (project.root / "code/merge.sh").unlink()
    result = materialize(definitions(project, LOCAL), instance, "merged", raise_on_error=False)
    message = str(failure(result).user_failure_data.description)
    assert "3 of its inputs are missing" in message
    assert "out/words/a.txt: materialize words@a first" in message
    assert "code/merge.sh: no stage makes it" in message


def test_a_stale_upstream_is_said(done: DvcProject, instance: dg.DagsterInstance) -> None:
    (done.root / "raw/a.txt").write_text("ten\n")
    result = materialize(definitions(done), instance, "report")
    assert metadata(result)["dvc/stale_upstream"] == ["words@a"]


def test_a_stage_that_left_dvc_yaml_says_so(done: DvcProject, instance: dg.DagsterInstance) -> None:
    assets = definitions(done)
    text = (done.root / "dvc.yaml").read_text()
    (done.root / "dvc.yaml").write_text(text.replace("  score:", "  points:"))
    result = materialize(assets, instance, "score", raise_on_error=False)
    assert "reload the code location" in str(failure(result).user_failure_data.description)


@pytest.mark.slow
def test_uncached_metrics_survive_a_failure(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """DVC deletes metrics that only git has, and cannot bring them back."""
    files = {
        "dvc.yaml": "stages:\n  one:\n    cmd: sh one.sh\n    deps: [one.sh]\n"
        "    metrics: [{m.json: {cache: false}}]\n",
        "one.sh": "echo '{\"a\": 1}' > m.json\n",
    }
    project = make_project(tmp_path / "project", files)
    repro(project.root)
    git(project.root, "add", "--all")
    (project.root / "one.sh").write_text("rm -f m.json; exit 1\n")
    result = materialize(definitions(project, LOCAL), instance, "one", raise_on_error=False)
    assert not result.success
    assert json.loads((project.root / "m.json").read_text()) == {"a": 1}
