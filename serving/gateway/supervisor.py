"""Several workers behind one socket: started, watched, restarted, and ended together.

The supervisor binds the socket and every worker inherits it, so a worker that dies takes no
waiting connection with it. Each worker also has a socket of its own on the loopback address, at
``metrics_port`` plus its number: metrics are a worker's, and Prometheus sums them up better than
one of the workers could. These sockets, too, live as long as the supervisor.

A worker that dies is started again, at once the first time and after a doubling wait when it keeps
dying. One that dies before it ever served means that nothing can be served: all end, with its
status. SIGTERM and SIGINT go to every worker, which drain; SIGHUP as well. When the supervisor is
killed, the kernel sends the workers SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from resources.processes import die_with_parent, send
from serving.gateway.listening import address

log = logging.getLogger("ratchet.gateway.supervisor")
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
#: A worker that lived for so long begins anew with its waits.
STEADY_SECONDS = 60.0


@dataclass
class Worker:
    """One place: its own socket, and the process that holds it now."""

    own: socket.socket
    process: subprocess.Popen[str] | None = None
    began: float = 0.0  # time.monotonic()
    wait: float = 0.0  # seconds before the next start
    starts_at: float = 0.0


class Supervisor:
    """See the module.

    Args:
        command: starts a worker, given ``--sockets`` with two descriptors more.
        shared: the gateway's socket, bound.
        own: the workers' own sockets, bound; one worker each.
        patience: seconds for the workers to end before they are killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        shared: socket.socket,
        own: Sequence[socket.socket],
        patience: float,
    ) -> None:
        self._command, self._shared, self._patience = list(command), shared, patience
        self._workers = [Worker(sock) for sock in own]

    def run(self) -> int:
        """Until a signal; the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for worker in self._workers:
            self._start(worker)
        for worker in self._workers:
            assert worker.process is not None and worker.process.stdout is not None
            if not worker.process.stdout.readline():
                status = worker.process.wait()
                self._end()
                return status or 1
        print(json.dumps(self._told()), flush=True)
        while True:
            due = min((w.starts_at for w in self._workers if w.process is None), default=None)
            pause = 3600.0 if due is None else max(due - time.monotonic(), 0.0)
            found = signal.sigtimedwait(_SIGNALS, pause)
            if found is not None and found.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._end()
                return 0
            if found is not None and found.si_signo == signal.SIGHUP:
                for worker in self._workers:
                    if worker.process is not None:
                        send(worker.process.pid, signal.SIGHUP)
            self._tend()

    def _told(self) -> dict[str, object]:
        return {
            "url": address(self._shared),
            "pid": os.getpid(),
            "workers": [
                {"pid": worker.process and worker.process.pid, "url": address(worker.own)}
                for worker in self._workers
            ],
        }

    def _start(self, worker: Worker) -> None:
        numbers = [self._shared.fileno(), worker.own.fileno()]
        worker.began = time.monotonic()
        worker.process = subprocess.Popen(
            [*self._command, "--sockets", ",".join(map(str, numbers))],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=numbers,
            preexec_fn=_as_a_worker,
        )

    def _tend(self) -> None:
        """Note who died, start who is due."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is not None and (status := worker.process.poll()) is not None:
                if now - worker.began > STEADY_SECONDS:
                    worker.wait = 0.0
                log.error("worker %s ended with status %s; its successor starts in %g s",
                          worker.process.pid, status, worker.wait)  # fmt: skip
                _close(worker.process)
                worker.process, worker.starts_at = None, now + worker.wait
                worker.wait = min(max(2 * worker.wait, FIRST_WAIT), LONGEST_WAIT)
            if worker.process is None and now >= worker.starts_at:
                self._start(worker)

    def _end(self) -> None:
        """SIGTERM to all, SIGKILL to those that do not end in time."""
        running = [w.process for w in self._workers if w.process is not None]
        for process in running:
            send(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._patience
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                log.error("worker %s does not end and is killed", process.pid)
                process.kill()
                process.wait()
            _close(process)


def _as_a_worker() -> None:
    """Runs in the child: signals arrive again, and the parent's end is its own."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    die_with_parent(signal.SIGTERM)


def _close(process: subprocess.Popen[str]) -> None:
    if process.stdout is not None:
        process.stdout.close()


def command(argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "serving.gateway", *argv]
