"""Running a process inside a Dagster step: its lines become the step's log, its failure is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import dagster as dg

from contracts.settings import Settings
from resources.spool import start_tracking


def run_process(
    context: dg.AssetExecutionContext,
    arguments: list[str],
    *,
    cwd: Path,
    env: dict[str, str] | None = None,
) -> list[str]:
    """Run ``python -m <arguments>``, log each line, return the lines.

    Raises:
        dagster.Failure: with the command, its exit code and the last 30 lines.
    """
    command = [sys.executable, "-m", *arguments]
    context.log.info("$ python -m %s", " ".join(arguments))
    lines: list[str] = []
    tail: deque[str] = deque(maxlen=30)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"DAGSTER_DVC_RUN_ID": context.run_id} | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            tail.append(lines[-1])
            context.log.info(lines[-1])
        code = process.wait()
    finally:
        if process.poll() is None:  # the run was cancelled: the process goes with it
            process.terminate()
            process.wait(timeout=60)
        start_tracking(Settings.from_env())
    if code:
        raise dg.Failure(
            description=f"python -m {' '.join(arguments)} exited with {code}:\n" + "\n".join(tail),
            metadata={"exit_code": code},
            allow_retries=False,
        )
    return lines
