"""Run one command and leave no process behind, whatever happens to whoever asked.

In: ``_supervise.py GRACE COMMAND…`` with a pipe as stdin. Out: the command's exit status
(128 + signal where it was killed). When the pipe closes or the parent is gone (killed, crashed,
cancelled), or on SIGTERM, everything that descends from this process gets SIGTERM and, GRACE
seconds later, SIGKILL. The same happens to what is left over when the command has ended.

Why a process of its own: a parent that is SIGKILLed cannot clean up, PR_SET_PDEATHSIG reaches
only direct children (the shell and the Python that DVC starts are grandchildren), and setting it
between fork and exec is unsafe in a threaded parent. On Linux this process is the *subreaper* of
the whole tree: orphans become its children, so that none can hide, not even behind setsid.
Standard library only; started with ``-I -S`` in about 20 ms.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PARENT_POLL_S = 1.0  # only a second line of defence: the pipe normally tells at once


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the process group has to do."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _parents() -> dict[int, int]:
    """Process → parent, for every process that can be seen (Linux)."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (pathlib costs 15 ms at every start)
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="latin-1") as stat:  # noqa: PTH123
                    # The command's name may hold anything: the fields start after its last ')'.
                    found[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    return found


def _descendants() -> list[int]:
    """Every living process below this one; on other systems the rest of the process group."""
    if sys.platform != "linux":
        return []
    parents = _parents()
    below, found = {os.getpid()}, []
    grew = True
    while grew:
        new = [pid for pid, parent in parents.items() if parent in below and pid not in below]
        below.update(new)
        found += new
        grew = bool(new)
    return found


def _reap(child: int, status: int | None) -> int | None:
    """Collect every ended child; the exit status of ``child`` once it has ended."""
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(raw)
            status = code if code >= 0 else 128 - code


def _signal_all(number: int) -> bool:
    """Send a signal to all descendants; False when there are none."""
    targets = _descendants()
    for pid in targets:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue
    if sys.platform != "linux" and number == signal.SIGTERM:
        os.killpg(os.getpgid(0), number)  # this process ignores it by now
    return bool(targets)


def _end_all(child: int, status: int | None, grace: float) -> int | None:
    """SIGTERM, wait up to ``grace`` seconds, SIGKILL; returns when no descendant is left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deadline = time.monotonic() + grace
    alive = _signal_all(signal.SIGTERM)
    while alive:
        status = _reap(child, status)
        alive = bool(_descendants())
        if alive and time.monotonic() > deadline:
            _signal_all(signal.SIGKILL)
        if alive:
            time.sleep(0.02)
    return _reap(child, status)


def main(arguments: list[str]) -> int:
    """Supervise one command; see the module docstring."""
    grace, command = float(arguments[0]), arguments[1:]
    parent = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    stop: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(  # kept: Popen.__del__ would collect an exit status behind our back
        command,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # the checkout's lock stays held while DVC lives
        # Safe here: this process has one thread. It covers the case that the supervisor itself
        # is SIGKILLed; then at least DVC dies with it.
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    child = process.pid
    status: int | None = None
    while status is None and not stop:
        ready, _, _ = select.select([0, wake], [], [], _PARENT_POLL_S)
        if wake in ready:
            os.read(wake, 4096)
        status = _reap(child, status)
        if (0 in ready and not os.read(0, 1)) or os.getppid() != parent:
            stop.append(0)
    status = _end_all(child, status, grace)
    process.returncode = status  # it was collected here: Popen must not wait for it
    return 128 + signal.SIGTERM if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
