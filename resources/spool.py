"""Stage executions on their way to MLflow: a crash-safe spool of small JSON files.

MLflow costs 5 CPU seconds to import, and a stage's output digest is only in dvc.lock after its
process has ended. So a stage writes one small record here, and ``resources.tracking``, one
background process a checkout, logs each record once the ``dvc repro`` above it has ended, under
Dagster and in a terminal alike. A record leaves the spool only after MLflow has it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contracts.digests import file_md5
from contracts.records import StageExecution
from contracts.settings import Settings


def record(
    *,
    stage: str,
    started: float,
    seconds: float,
    params: dict[str, Any],
    metrics: dict[str, float],
    paths: dict[str, str],
    error: str | None,
) -> None:
    """Spool one execution. Never fails a stage: a full disk costs the record, with a word."""
    settings = Settings.from_env()
    if not settings.tracking:
        return
    dagster_run = os.environ.get("DAGSTER_DVC_RUN_ID")
    parent = _dvc_parent()
    execution = StageExecution(
        stage=stage,
        partition=os.environ.get("DAGSTER_DVC_PARTITION") or paths.get("key"),
        execution=f"dagster-{dagster_run}" if dagster_run else f"dvc-{parent or os.getppid()}",
        process=parent,
        driver="dagster" if dagster_run else "dvc",
        dagster_run_id=dagster_run,
        started=datetime.fromtimestamp(started, UTC).isoformat(),
        seconds=round(seconds, 3),
        status="FAILED" if error else "FINISHED",
        params=params,
        metrics=metrics,
        paths=paths,
        git_commit=_git_commit(settings.root),
        lock_md5=lock_md5(settings.root),
        device="cpu",
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        error=error,
    )
    try:
        settings.spool_dir.mkdir(parents=True, exist_ok=True)
        path = settings.spool_dir / f"{execution.started}-{stage}-{uuid.uuid4().hex[:8]}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(execution.model_dump()), encoding="utf-8")
        os.replace(part, path)
    except OSError as problem:
        print(f"{stage}: MLflow will not hear of this execution: {problem}", file=sys.stderr)
        return
    # Under Dagster the run starts it (assets/stages.py): a stage's processes end with the stage.
    if parent and not dagster_run:
        start_tracking(settings)


def _dvc_parent() -> str | None:
    """``<pid>-<start ticks>`` of the ``dvc repro`` above this process, if there is one."""
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if b"dvc" in command and b" repro" in command and b"sh -c" not in command:
            return f"{pid}-{fields[19]}"
        pid = int(fields[1])
    return None


def start_tracking(settings: Settings) -> None:
    """Start the process that empties the spool; where one is at work already, it exits at once."""
    if not any(settings.spool_dir.glob("*.json")):
        return
    with (settings.spool_dir / "tracking.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "resources.tracking"],
            cwd=settings.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def lock_md5(root: Path) -> str | None:
    """MD5 of dvc.lock, if there is one."""
    lock = root / "dvc.lock"
    return file_md5(lock) if lock.is_file() else None


def _git_commit(root: Path) -> str | None:
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
