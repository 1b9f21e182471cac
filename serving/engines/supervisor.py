"""Starts one engine, waits until tokens flow, stays with it, and ends its whole process tree.

In: a Launch. Out: the engine's URL while the supervisor lives. The engine runs in a session of its
own, so that its core and worker can be found and ended even when the API server was killed, which
leaves them running otherwise (seen with vLLM 0.32). Should the supervisor itself be killed, the
kernel sends the API server a SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from contracts.errors import ServiceError
from resources import processes
from serving.engines import probe
from serving.engines.launch import Launch

PORT_TAKEN = "address already in use"
TAIL_LINES = 25
#: Bytes. A longer log is set aside (one old one is kept) before an engine starts.
MAX_LOG = 8 << 20


class Stopped(Exception):
    """A signal asked the supervisor to end before the engine was ready."""


class Supervisor:
    """One engine process and its children.

    Args:
        launch: what to start.
        host: address to listen on.
        port: TCP port, or 0 for a free one.
        log: file that receives the engine's output, appended.
        environ: the environment to derive the engine's from.
    """

    def __init__(
        self, launch: Launch, *, host: str, port: int, log: Path, environ: dict[str, str]
    ) -> None:
        self.launch, self.host, self.wanted_port, self.log = launch, host, port, log
        self.environ = environ
        self.port = 0
        self.stopping = False
        self._child: subprocess.Popen[bytes] | None = None
        self._ticks = 0
        self._reservation: socket.socket | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def engine_pid(self) -> int:
        """Pid and session of the engine's leader."""
        return self._child.pid if self._child else 0

    def start(self, timeout: float, on_spawn: Callable[[], object] = lambda: None) -> float:
        """Start the engine and wait until a token came out of it; return the seconds it took.

        Raises ServiceError with the end of the log when the engine dies or ``timeout`` passes
        (the tree is ended then), Stopped when :meth:`stop_soon` was called meanwhile.
        """
        begun = time.monotonic()
        for attempt in (1, 2, 3):
            self._spawn()
            on_spawn()
            try:
                self._wait_ready(begun + timeout)
                return time.monotonic() - begun
            except ServiceError:
                taken = PORT_TAKEN in self._tail(200).lower()
                self.end()
                if self.wanted_port or not taken or attempt == 3:
                    raise
            except BaseException:
                self.end()
                raise
        raise AssertionError("unreachable")

    def watch(self) -> None:
        """Return when asked to stop; raise ServiceError when the engine ends by itself."""
        while not self.stopping:
            if (code := self._exit_code()) is not None:
                self.end()
                raise ServiceError(
                    f"The engine ended by itself ({_exit_words(code)}).",
                    where=f"{self.url}, log {self.log}",
                    next=self._tail_hint(),
                )
            time.sleep(0.1)

    def stop_soon(self) -> None:
        """For signal handlers: ask :meth:`start` and :meth:`watch` to return."""
        self.stopping = True

    def end(self, grace: float = 15.0) -> None:
        """End the engine's whole tree. Safe to repeat."""
        if self._child is not None:
            processes.end_session(self._child.pid, self._ticks, grace)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def _spawn(self) -> None:
        self.port = self.wanted_port or self._reserve_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > MAX_LOG:
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        with self.log.open("ab") as stream:
            self._log_start = stream.tell()
            self._child = subprocess.Popen(
                self.launch.argv(self.host, self.port),
                env=self.launch.environ(self.environ),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=processes.die_with_parent,
            )
        self._ticks = processes.start_ticks(self._child.pid) or 0

    def _reserve_port(self) -> int:
        """A free port that stays ours while the engine imports for half a minute.

        The socket is bound and never listens: another socket with SO_REUSEADDR (vLLM sets it) may
        bind the same port beside it, and the kernel hands the port to nobody else.
        """
        if self._reservation is not None:
            self._reservation.close()
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._reservation = socket.socket(family, socket.SOCK_STREAM)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((self.host, 0))
        return int(self._reservation.getsockname()[1])

    def _wait_ready(self, deadline: float) -> None:
        """Until /health answers and one token came out."""
        trouble = "it does not answer /health yet"
        while time.monotonic() < deadline:
            if self.stopping:
                raise Stopped
            if (code := self._exit_code()) is not None:
                raise ServiceError(
                    f"The engine ended while it was starting ({_exit_words(code)}).",
                    where=f"model {self.launch.model}, log {self.log}",
                    next=self._tail_hint(),
                )
            if probe.healthy(self.url):
                try:
                    left = max(1.0, deadline - time.monotonic())
                    probe.tokens_flow(self.url, self.launch.name, left)
                    return
                except ServiceError as error:
                    trouble = error.what
            time.sleep(0.1)
        raise ServiceError(
            f"The engine was not ready in time: {trouble}.",
            where=f"{self.url}, log {self.log}",
            next=f"a loaded machine needs up to 150 s: raise --ready-timeout; {self._tail_hint()}",
        )

    def _exit_code(self) -> int | None:
        return self._child.poll() if self._child else 0

    def _tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines that this start wrote to the log."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(self._log_start, stream.tell() - 64_000))
                text = stream.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _tail_hint(self) -> str:
        return f"the last lines of the log say:\n{self._tail()}"


def _exit_words(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
