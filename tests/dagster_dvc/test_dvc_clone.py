"""The clone runner: the stage runs elsewhere, the result comes back, nothing runs twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dagster as dg
import pytest
from dvc_fixture import (
    definitions,
    dvc,
    dvc_stale,
    edit,
    failure,
    git,
    make_project,
    materialize,
    metadata,
)

from dagster_dvc import CannotTravel, CloneRunner, DvcProject, LocalRunner, StageRequest
from dagster_dvc.clone import check_out, obstacles, snapshot

CLONE = CloneRunner(grace_s=0.5)

# Each stage leaves a mark outside of any checkout: who ran it, and where.
FILES = {
    "dvc.yaml": """
stages:
  first:
    cmd: sh first.sh
    deps: [first.sh, seed.txt]
    params: [suffix]
    outs: [out/first]
  second:
    cmd: cat out/first/a.txt > out/second.txt; echo '{"n":2}' > out/second.json; sh mark.sh second
    deps: [out/first, mark.sh]
    outs: [out/second.txt]
    metrics: [out/second.json: {cache: false}]
""",
    "params.yaml": "suffix: one\n",
    "seed.txt": "seed\n",
    "first.sh": "set -eu\nmkdir -p out/first\n"
    'sed "s/$/ $(sed "s/suffix: //" params.yaml)/" seed.txt > out/first/a.txt\n'
    "cp out/first/a.txt out/first/b.txt\nsh mark.sh first\n",
    "mark.sh": 'if [ -n "${MARKS:-}" ]; then pwd >> "$MARKS/$1"; fi\n',
    ".gitignore": "/out\n",
}


@pytest.fixture
def travelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DvcProject:
    """A project with a remote beside it (relative address), and marks under ``tmp_path``."""
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    project = make_project(tmp_path / "control", FILES)
    config = project.root / ".dvc/config"
    config.write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
    git(project.root, "commit", "--quiet", "--all", "--message", "remote")
    return project


def marks(project: DvcProject, stage: str) -> list[str]:
    """The folders in which a stage's command was executed."""
    path = project.root.parent / "marks" / stage
    return path.read_text().split() if path.exists() else []


@pytest.mark.slow
def test_a_stage_runs_in_a_clone_and_its_result_comes_back(
    travelling: DvcProject, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    project = travelling
    edit(project.root / "params.yaml", "one", "two")  # not committed
    (project.root / "untracked.txt").write_text("goes along\n")
    assets = definitions(project, CLONE)
    said = metadata(materialize(assets, instance, "first"))
    assert (said["dvc/how"], said["dvc/runner"], said["dvc/uncommitted"]) == ("ran", "clone", 2)
    assert (project.root / "out/first/a.txt").read_text() == "seed two\n"
    (where,) = marks(project, "first")
    assert where != str(project.root) and "/clones/" in where

    said = metadata(materialize(assets, instance, "second"))  # its input is fetched by the clone
    assert (said["dvc/how"], said["metric/n"]) == ("ran", 2)
    assert json.loads((project.root / "out/second.json").read_text()) == {"n": 2}
    assert dvc_stale(project.root) == set()
    assert len(marks(project, "second")) == 1
    assert not list((project.work_dir / "clones").iterdir())

    again = metadata(materialize(assets, instance, "second"))
    assert again["dvc/how"] == "unchanged" and len(marks(project, "second")) == 1

    # Somebody else's checkout takes the result from the remote, through either runner.
    colleague = tmp_path / "colleague"
    git(tmp_path, "clone", "--quiet", str(project.root), str(colleague))
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(project.root / name, colleague / name)
    pulled = definitions(DvcProject(colleague), LocalRunner(pull=True))
    with dg.DagsterInstance.ephemeral() as other:
        assert metadata(materialize(pulled, other, "first"))["dvc/how"] == "pulled"
    assert len(marks(project, "first")) == 1


@pytest.mark.slow
def test_a_stage_that_fails_in_its_clone_touches_nothing_here(
    travelling: DvcProject, instance: dg.DagsterInstance
) -> None:
    project = travelling
    dvc(project.root, "repro", "first")
    lock = (project.root / "dvc.lock").read_bytes()
    edit(project.root / "first.sh", "cp out", "exit 5; cp out")
    result = materialize(definitions(project, CLONE), instance, "first", raise_on_error=False)
    data = failure(result).user_failure_data
    assert "in a checkout of its own" in data.description
    assert (project.root / "out/first/b.txt").exists()
    assert (project.root / "dvc.lock").read_bytes() == lock
    kept = project.root / str(data.metadata["dvc/failed_output"].value)
    assert (kept / "out/first/a.txt").read_text() == "seed one\n"


@pytest.mark.slow
def test_the_control_side_never_executes(
    travelling: DvcProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody edits a parameter while the stage runs elsewhere: refused, not executed here."""
    project = travelling
    run_in = CloneRunner._run_in

    def edited_meanwhile(self: CloneRunner, *arguments: object) -> str:
        how = run_in(self, *arguments)  # type: ignore[arg-type]
        edit(project.root / "params.yaml", "one", "three")
        return how

    monkeypatch.setattr(CloneRunner, "_run_in", edited_meanwhile)
    node = project.manifest().node("first")
    with pytest.raises(Exception, match="does not fit this one"):
        CLONE.run(StageRequest(project, node, lambda line: None))
    assert all("/clones/" in where for where in marks(project, "first"))
    assert not (project.root / "out/first").exists()


def test_a_snapshot_has_what_git_calls_changed(travelling: DvcProject, tmp_path: Path) -> None:
    root = travelling.root
    (root / "a b.txt").write_text("new, with a space\n")
    (root / "seed.txt").unlink()
    edit(root / "params.yaml", "one", "two")
    (root / "out").mkdir()
    (root / "out/ignored.txt").write_text("no\n")
    taken = snapshot(root)
    assert taken.changed == ("a b.txt", "params.yaml") and taken.deleted == ("seed.txt",)
    check_out(taken, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"a b.txt", "params.yaml", "dvc.yaml"} <= names
    assert not {"seed.txt", "out"} & names
    assert (tmp_path / "copy/params.yaml").read_text() == "suffix: two\n"


def test_what_cannot_travel_says_everything(
    project: DvcProject, instance: dg.DagsterInstance
) -> None:
    edit(project.root / "dvc.yaml", "deps: [out/report.txt]", "always_changed: true")
    node = project.manifest().node("score")
    reasons = obstacles(project.manifest(), node)
    assert ["no default remote" in reasons[0], "no dependencies" in reasons[1]] == [True, True]
    (project.root / "new.txt").write_text("x\n")
    with pytest.raises(CannotTravel, match=r"(?s)no default remote.*new\.txt is not committed"):
        CloneRunner(require_clean=True).run(StageRequest(project, node, lambda line: None))
