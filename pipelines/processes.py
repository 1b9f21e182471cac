"""Child processes that never outlive their parent, and waiting for their ports."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from contracts.errors import ServiceError
from pipelines.status import answers
from resources.processes import die_with_parent


@dataclass
class Service:
    """One process with a log file and an address that answers when it is ready."""

    name: str
    command: list[str]
    url: str | None
    log: Path
    cwd: Path
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the rest in order
                preexec_fn=die_with_parent,
            )

    def wait_ready(self, timeout: float) -> None:
        """Until the address answers. Raises ServiceError when it dies or is late."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            if self.url is None or answers(self.url):
                return
            time.sleep(0.25)
        raise ServiceError(
            f"{self.name} does not answer after {timeout:.0f} s.",
            where=self.url,
            next=f"read {self.log}",
        )

    def check(self) -> None:
        """Raises ServiceError with the log's last lines when the process has ended."""
        if self.process is None or self.process.poll() is None:
            return
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        raise ServiceError(
            f"{self.name} ended with exit code {self.process.returncode}:\n" + "\n".join(tail),
            where=str(self.log),
            next="if its port is taken, set RATCHET_GATEWAY_PORT, RATCHET_PRIVATE_PORT, "
            "RATCHET_DAGSTER_PORT or RATCHET_MLFLOW_PORT",
        )

    def stop(self, timeout: float = 20.0) -> None:
        """SIGTERM to its whole group, SIGKILL after ``timeout`` seconds."""
        if self.process is None or self.process.poll() is not None:
            return
        for sig, wait in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
                return
