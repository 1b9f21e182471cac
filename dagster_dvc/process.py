"""Run a command under the supervisor and hand on its output line by line.

In: a command, a folder, an environment, a function for lines. Out: the exit status. A command that
is left early (an exception, Ctrl-C, a cancelled Dagster run) is ended with everything below it
before the exception goes on; one whose parent dies is ended by ``_supervise.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SUPERVISOR = Path(__file__).with_name("_supervise.py")
GRACE_S = 5.0  # between SIGTERM and SIGKILL

Emit = Callable[[str], None]


def run_supervised(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    emit: Emit,
    grace_s: float = GRACE_S,
    keep_open: Sequence[int] = (),
) -> int:
    """Run ``command`` to its end.

    Args:
        command: program and arguments.
        cwd: where it runs.
        env: its whole environment.
        emit: called with each line of stdout and stderr, without the line end, as it comes.
        grace_s: seconds between SIGTERM and SIGKILL when it is cut short.
        keep_open: file descriptors that it inherits (a lock that must live as long as it does).

    Returns:
        The exit status; 128 + signal where a signal ended it.
    """
    supervised = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(grace_s), *command]
    process = subprocess.Popen(
        supervised,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:  # universal newlines: progress bars come as lines too
            text = line.rstrip()
            if text:
                emit(text)
        return process.wait()
    except BaseException:
        process.stdin.close()  # the supervisor takes this as "end everything"
        try:
            process.wait(timeout=grace_s + 5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        for stream in (process.stdin, process.stdout):
            try:
                stream.close()
            except OSError:
                continue


def stage_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a ``dvc`` process: ours, quiet, unbuffered, with our ``python`` first.

    A Dagster daemon is often started by the absolute path of its environment; ``python`` in a
    stage's command must be that of the same environment all the same.
    """
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    ours = str(Path(sys.executable).parent)
    folders = env.get("PATH", os.defpath).split(os.pathsep)
    if folders[0] != ours:
        env["PATH"] = os.pathsep.join([ours, *folders])
    env.pop("DVC_ROOT", None)  # set by DVC for a stage; ours may itself run inside one
    env.pop("DVC_STAGE", None)
    env.update(extra)
    return env


def dvc_command(*arguments: str) -> list[str]:
    """``dvc`` of this interpreter. ``-P`` keeps the project's own modules off DVC's path."""
    return [sys.executable, "-P", "-m", "dvc", *arguments]
