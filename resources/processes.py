"""Processes by identity: a pid with the moment it started, so that a recycled pid is never hit.

Linux only: everything is read from /proc. ``ticks`` is the start time in clock ticks since boot
(field 22 of /proc/<pid>/stat). A *tree* here is every process of one session: vLLM's engine core
and worker stay in the session of the API server, also when that one was killed and cannot end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_ticks(pid: int) -> int | None:
    """When that process started, or None when there is none (a zombie counts as none)."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def alive(pid: int, ticks: int) -> bool:
    """Whether exactly that process runs."""
    return start_ticks(pid) == ticks


def session_of(session: int, since_ticks: int) -> list[int]:
    """Living processes of that session that started at ``since_ticks`` or later."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and fields[0] != "Z" and int(fields[3]) == session:
                found.append((int(entry.name), int(fields[19])))
    return [pid for pid, ticks in found if ticks >= since_ticks]


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    """Poll ``condition`` until it holds or ``seconds`` have passed; say whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every)
    return True


def end_session(session: int, since_ticks: int, grace: float) -> None:
    """SIGTERM to the session's leader, then after ``grace`` seconds SIGKILL to all that is left."""
    if session in session_of(session, since_ticks):
        send(session, signal.SIGTERM)
        wait_until(lambda: session not in session_of(session, since_ticks), grace)
    # The leader is gone or does not listen. Its children get a moment to see that by themselves.
    if not wait_until(lambda: not session_of(session, since_ticks), 1.0):
        for pid in session_of(session, since_ticks):
            send(pid, signal.SIGKILL)
        wait_until(lambda: not session_of(session, since_ticks), 5.0)


def die_with_parent(sig: int = signal.SIGTERM) -> None:
    """Ask the kernel for ``sig`` when the parent (the thread that forked us) ends; listen to it.

    Children inherit what is ignored: a shell ignores SIGINT for what it puts into the background,
    and Dagster's commands then do so with SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)


def send(pid: int, sig: int) -> None:
    """A signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, sig)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the state on: [0] state, [3] session, [19] start ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text.rpartition(")")[2].split()
