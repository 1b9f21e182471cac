"""The supervisor: nothing that it started outlives it, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc_fixture import wait_until

from dagster_dvc.process import run_supervised, stage_environment

# Starts a grandchild in a session of its own, writes both PIDs, and waits.
TREE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"],
                         start_new_session=True)
with open(sys.argv[1] + ".draft", "w") as out:
    out.write(f"{os.getpid()} {child.pid}")
os.replace(sys.argv[1] + ".draft", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


def alive(pid: int) -> bool:
    """Whether a process lives; one that is dead but not collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def tree(pids: Path, seconds: float) -> list[str]:
    return [sys.executable, "-S", "-c", TREE, str(pids), str(seconds)]


def read_pids(path: Path) -> list[int]:
    wait_until(path.exists, 30, "the processes start")
    return [int(pid) for pid in path.read_text().split()]


def run(command: list[str], folder: Path, **options: object) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = run_supervised(
        command,
        cwd=folder,
        env=stage_environment({}),
        emit=lines.append,
        **options,  # type: ignore[arg-type]
    )
    return code, lines


def test_lines_and_exit_status_come_through(tmp_path: Path) -> None:
    script = "printf 'one\\ntwo\\r'; echo three >&2; printf '\\377\\n'; exit 7"
    code, lines = run(["sh", "-c", script], tmp_path)
    assert code == 7
    assert lines == ["one", "two", "three", "\ufffd"]


def test_a_signal_is_reported_as_a_shell_does(tmp_path: Path) -> None:
    code, _ = run(["sh", "-c", "kill -9 $$"], tmp_path)
    assert code == 128 + signal.SIGKILL


def test_stdin_is_empty(tmp_path: Path) -> None:
    code, lines = run(["sh", "-c", "cat; echo end"], tmp_path)
    assert (code, lines) == (0, ["end"])


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    code, _ = run(tree(tmp_path / "pids", 0.0), tmp_path, grace_s=0.5)
    assert code == 0
    assert not any(alive(pid) for pid in read_pids(tmp_path / "pids"))


def test_an_interrupted_caller_ends_the_tree(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def emit(line: str) -> None:
        raise Interrupted

    pids = tmp_path / "pids"
    command = tree(pids, 300.0)
    command[3] = command[3].replace("time.sleep(float", "print('up', flush=True)\ntime.sleep(float")
    with pytest.raises(Interrupted):
        run_supervised(command, cwd=tmp_path, env=stage_environment({}), emit=emit, grace_s=0.5)
    assert not any(alive(pid) for pid in read_pids(pids))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "supervisor"])
def test_a_killed_process_takes_the_tree_with_it(tmp_path: Path, victim: str) -> None:
    pids = tmp_path / "pids"
    program = (
        "import sys; from pathlib import Path;"
        "from dagster_dvc.process import run_supervised, stage_environment;"
        f"run_supervised({tree(pids, 300.0)!r}, cwd=Path('.'), env=stage_environment({{}}),"
        "emit=print, grace_s=0.5)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    try:
        direct, grandchild = read_pids(pids)
        if victim == "parent":
            parent.kill()
            parent.wait()
            wait_until(lambda: not alive(direct) and not alive(grandchild), 20, "the tree ends")
        else:  # only its direct child is promised to die; the rest is ended by the next holder
            stat = Path(f"/proc/{direct}/stat").read_text().rpartition(")")[2].split()
            os.kill(int(stat[1]), signal.SIGKILL)
            wait_until(lambda: not alive(direct), 20, "the command ends")
            os.kill(grandchild, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()


def test_many_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    seen: dict[int, tuple[int, list[str]]] = {}

    def one(number: int) -> None:
        seen[number] = run(["sh", "-c", f"echo {number}; exit {number}"], tmp_path)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {number: (number, [str(number)]) for number in range(8)}
