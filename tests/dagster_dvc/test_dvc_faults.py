"""Kills, cancellations, and company: nothing is left that needs a human."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
from dvc_fixture import (
    definitions,
    dvc,
    dvc_stale,
    edit,
    failure,
    make_project,
    materialize,
    metadata,
    repro,
    wait_until,
)

from dagster_dvc import (
    CheckoutBusy,
    DvcProject,
    InputsMissing,
    LocalRunner,
    Patience,
    repair,
)
from dagster_dvc.checkout import Checkout, Held

ROOT = Path(__file__).parents[2]
LOCAL = LocalRunner(Patience(busy=60.0), grace_s=0.5)

RUN = """
import sys
sys.path[:0] = {path!r}
import dagster as dg
from dagster_dvc import DvcProject, LocalRunner, dvc_assets
assets = dvc_assets(DvcProject({root!r}), runner=LocalRunner(grace_s=0.5))
selection = dg.AssetSelection.assets({asset!r})
result = dg.materialize(assets, selection=selection, partition_key={key!r}, raise_on_error=False)
sys.exit(0 if result.success else 1)
"""


def run_process(project: DvcProject, asset: str, key: str | None = None) -> subprocess.Popen[bytes]:
    """A Dagster run in a process of its own."""
    code = RUN.format(path=[str(ROOT)], root=str(project.root), asset=asset, key=key)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def slow_merge(project: DvcProject) -> Path:
    """Make ``merged`` write half its output, then its PIDs, then wait. Returns the PID file."""
    pids = project.root / "pids"
    edit(
        project.root / "code/merge.sh",
        "sort ",
        f'echo half > "$target/words.txt"; sleep 300 & echo $$ $! > {pids}.draft; '
        f"mv {pids}.draft {pids}; wait; sort ",
    )
    return pids


def read_pids(path: Path) -> list[int]:
    wait_until(path.exists, 60, "the stage starts")
    return [int(pid) for pid in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def quick_merge(project: DvcProject) -> None:
    text = (project.root / "code/merge.sh").read_text()
    start, end = text.index("echo half"), text.index("sort ")
    (project.root / "code/merge.sh").write_text(text[:start] + text[end:] + "# changed\n")
    (project.root / "pids").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_killed_run_needs_nobody(done: DvcProject, instance: dg.DagsterInstance) -> None:
    good = (done.root / "out/merged/words.txt").read_bytes()
    pids = slow_merge(done)
    run = run_process(done, "merged")
    try:
        stage = read_pids(pids)
        run.send_signal(signal.SIGKILL)
        run.wait(30)
        wait_until(lambda: not any(map(alive, stage)), 30, "the stage's processes end")
    finally:
        run.kill()
    assert (done.root / "out/merged/words.txt").read_text() == "half\n"  # nobody was left to act
    quick_merge(done)
    # Any stage of the checkout puts it right, not only the one that was killed.
    assert metadata(materialize(definitions(done, LOCAL), instance, "report"))["dvc/how"] in (
        "unchanged",
        "run_cache",
    )
    assert (done.root / "out/merged/words.txt").read_bytes() == good
    kept = done.work_dir / "failed/merged/out/merged/words.txt"
    assert kept.read_text() == "half\n"
    assert metadata(materialize(definitions(done, LOCAL), instance, "merged"))["dvc/how"] == "ran"
    assert dvc_stale(done.root) == set()


@pytest.mark.slow
def test_a_cancelled_run_ends_the_stage_and_puts_the_output_back(done: DvcProject) -> None:
    good = (done.root / "out/merged/words.txt").read_bytes()
    pids = slow_merge(done)
    run = run_process(done, "merged")
    try:
        stage = read_pids(pids)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) != 0
        assert not any(map(alive, stage))
    finally:
        run.kill()
    assert (done.root / "out/merged/words.txt").read_bytes() == good
    assert not (done.work_dir / "running.json").exists()


@pytest.mark.slow
def test_sixteen_partitions_at_once(tmp_path: Path) -> None:
    keys = [f"k{number:02}" for number in range(16)]
    project = make_project(
        tmp_path / "project",
        {
            "dvc.yaml": "stages:\n  part:\n    foreach: [" + ", ".join(keys) + "]\n    do:\n"
            "      cmd: mkdir -p out && echo ${item} > out/${item}.txt\n"
            '      deps: [seed.txt]\n      outs: ["out/${item}.txt"]\n'
            "  all:\n    cmd: cat out/*.txt > all.txt\n    deps:\n"
            + "".join(f"      - out/{key}.txt\n" for key in keys)
            + "    outs: [all.txt]\n",
            "seed.txt": "seed\n",
        },
    )
    assets = definitions(project, LOCAL)

    def one(key: str) -> dg.ExecuteInProcessResult:
        with dg.DagsterInstance.ephemeral() as instance:  # its SQLite is one thread's
            return materialize(assets, instance, "part", key)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, keys))
    assert all(result.success for result in results)
    assert {metadata(result)["dvc/how"] for result in results} == {"ran"}
    repro(project.root, "all", single=True)
    assert (project.root / "all.txt").read_text().split() == keys
    assert set(project.lock()) == {"all", *(f"part@{key}" for key in keys)}
    assert dvc_stale(project.root) == set()


@pytest.mark.slow
def test_a_busy_terminal_is_waited_for(done: DvcProject, instance: dg.DagsterInstance) -> None:
    """Somebody's `dvc repro merged` runs; `report` reads its output and is told "busy"."""
    pids = slow_merge(done)
    terminal = subprocess.Popen(
        [sys.executable, "-P", "-m", "dvc", "repro", "--single-item", "merged"],
        cwd=done.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        sleeper = read_pids(pids)[1]
        edit(done.root / "params.yaml", "title: Words", "title: Other")
        assets = definitions(done, LocalRunner(Patience(busy=1.0)))
        (done.root / "out/merged").mkdir(exist_ok=True)
        (done.root / "out/merged/words.txt").write_text("there\n")
        refused = materialize(assets, instance, "report", raise_on_error=False)
        message = str(failure(refused).user_failure_data.description)
        assert "busy" in message and "being blocked by" in message
        assert (done.root / "out/report.txt").exists()

        patient = definitions(done, LocalRunner(Patience(busy=90.0)))
        threading.Timer(3.0, os.kill, (sleeper, signal.SIGKILL)).start()
        assert materialize(patient, instance, "report").success
    finally:
        os.killpg(terminal.pid, signal.SIGKILL)
        terminal.wait()


@pytest.mark.slow
def test_two_drivers_write_the_same_lock(project: DvcProject, tmp_path: Path) -> None:
    """`dvc repro` in one clone and Dagster in another; then each skips what the other did."""
    import shutil

    other = DvcProject(shutil.copytree(project.root, tmp_path / "other", symlinks=True))
    dvc(other.root, "repro")
    with dg.DagsterInstance.ephemeral() as instance:
        assets = definitions(project, LOCAL)
        job = dg.define_asset_job("rest", ["merged", "report", "score"])
        defs = dg.Definitions(assets=assets, jobs=[job])
        for key in ("a", "b"):
            assert materialize(assets, instance, "words", key).success
        assert defs.resolve_job_def("rest").execute_in_process(instance=instance).success
    assert (project.root / "dvc.lock").read_bytes() == (other.root / "dvc.lock").read_bytes()

    again = dvc(project.root, "repro").stdout
    assert again.count("didn't change, skipping") == 5 and "Running stage" not in again
    with dg.DagsterInstance.ephemeral() as instance:
        said = metadata(materialize(definitions(other, LOCAL), instance, "report"))
        assert said["dvc/how"] == "unchanged"


# -- the lock and the repairs, without DVC's command line ------------------------------------------


def hold(project: DvcProject, patience: Patience, said: list[str]) -> Held:
    with Checkout(project, patience).exclusive("mine", said.append) as held:
        return held


def test_waiting_has_a_deadline_and_names_the_holder(done: DvcProject) -> None:
    said: list[str] = []
    refused = pytest.raises(CheckoutBusy, match=r"held by stage 'theirs' \(PID \d+")
    with Checkout(done).exclusive("theirs", said.append), refused:
        hold(done, Patience(lock=0.2), said)
    assert any("mine waits for stage 'theirs'" in line for line in said)
    hold(done, Patience(lock=0.2), said)  # free again


def test_a_damaged_rwlock_is_removed(done: DvcProject) -> None:
    table = done.dvc_dir / "tmp/rwlock"
    table.write_text('{"write": {"/x": {"pi')
    said: list[str] = []
    hold(done, Patience(), said)
    assert not table.exists()
    assert any("damaged" in line for line in said)


def test_entries_of_the_dead_and_of_strangers_are_dropped(done: DvcProject) -> None:
    """DVC drops a PID that is gone; it would wait for ever for one given to another program."""
    table = done.dvc_dir / "tmp/rwlock"
    # A child of its own: a test runner may rewrite its own command line (pytest-xdist does).
    waits = [sys.executable, "-c", "input()", "repro -s", "one two"]
    gone = subprocess.Popen(["true"])
    gone.wait()
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as child:
        stranger = {"pid": child.pid, "cmd": "something that it is not"}
        living = {"pid": child.pid, "cmd": "/else/where/dvc repro -s one two"}
        table.write_text(
            json.dumps(
                {
                    "write": {
                        "/a": stranger,
                        "/b": living,
                        "/c": {"pid": gone.pid, "cmd": "x"},
                    },
                    "read": {"/a": [stranger, living], "/c": [stranger]},
                }
            )
        )
        repair.drop_dead_entries(done.dvc_dir)
        child.communicate(b"\n")
    assert json.loads(table.read_text()) == {"write": {"/b": living}, "read": {"/a": [living]}}


def test_a_lock_file_cut_short_by_a_kill_is_restored(
    done: DvcProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = done.manifest().node("merged")
    whole = (done.root / "dvc.lock").read_bytes()
    with Checkout(done).exclusive("merged", print) as held:
        held.begin(node)  # and then this process "dies"
    (done.root / "dvc.lock").write_bytes(whole[: len(whole) // 2] + b"\n: [")
    monkeypatch.setattr(Held, "put_back", lambda self, stage, outs, copied: None)
    said: list[str] = []
    hold(done, Patience(), said)
    assert (done.root / "dvc.lock").read_bytes() == whole
    assert any("an earlier run of merged was killed" in line for line in said)
    assert not (done.work_dir / "running.json").exists()


@pytest.mark.slow
def test_a_supervisors_orphans_are_found_by_their_token(done: DvcProject) -> None:
    node = done.manifest().node("score")
    with Checkout(done).exclusive("score", print) as held:
        held.begin(node)
        token = held._token
    orphan = subprocess.Popen(["sleep", "300"], env={**os.environ, "DAGSTER_DVC_TOKEN": token})
    try:
        hold(done, Patience(), [])
        assert orphan.wait(10) == -signal.SIGKILL
        assert not (done.work_dir / "running.json").exists()
    finally:
        orphan.kill()
        orphan.wait()


def test_inputs_missing_lists_all(project: DvcProject) -> None:
    node = project.manifest().node("merged")
    refused = pytest.raises(InputsMissing, match="2 of its inputs are missing")
    with Checkout(project).exclusive("merged", print) as held, refused:
        held.fetch_inputs(node)


@pytest.mark.slow
def test_nothing_is_written_into_the_projects_tree(done: DvcProject) -> None:
    repro(done.root)
    before = {p for p in done.root.rglob("*") if ".dvc/tmp" not in str(p)}
    done.state()
    hold(done, Patience(), [])
    assert {p for p in done.root.rglob("*") if ".dvc/tmp" not in str(p)} == before


@pytest.mark.parametrize("protected", [True, False], ids=["read-only", "writable"])
def test_a_corrupted_cache_object_is_never_taken_for_the_output(
    done: DvcProject, instance: dg.DagsterInstance, protected: bool
) -> None:
    """Damaged bytes under the right name: the stage runs again, nothing is built on them."""
    good = (done.root / "out/report.txt").read_bytes()
    md5 = hashlib.md5(good, usedforsecurity=False).hexdigest()
    cached = done.dvc_dir / "cache/files/md5" / md5[:2] / md5[2:]
    cached.chmod(0o644)
    cached.write_bytes(b"these are not the bytes\n")
    if protected:
        cached.chmod(0o444)
    (done.root / "out/report.txt").unlink()
    assets = definitions(done, LocalRunner())
    assert materialize(assets, instance, "report").success
    assert (done.root / "out/report.txt").read_bytes() == good
    assert cached.read_bytes() == good


def test_a_corrupted_input_is_not_checked_out(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    """The maker of a missing input has damaged bytes in the cache: it is named, nothing runs."""
    words = done.root / "out/merged/words.txt"
    md5 = hashlib.md5(words.read_bytes(), usedforsecurity=False).hexdigest()
    cached = done.dvc_dir / "cache/files/md5" / md5[:2] / md5[2:]
    cached.chmod(0o644)
    cached.write_bytes(b"these are not the bytes\n")
    cached.chmod(0o444)
    shutil.rmtree(done.root / "out/merged")
    edit(done.root / "params.yaml", "title: ", "title: another ")
    result = materialize(definitions(done, LocalRunner()), instance, "report", raise_on_error=False)
    assert not result.success
    assert "materialize merged again" in str(failure(result).error)
    assert not words.exists()
