from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts.errors import ServiceError
from contracts.settings import ROOT
from pipelines.processes import Service
from tests.conftest import free_port


def service(tmp_path: Path, code: str, url: str | None = None) -> Service:
    return Service("thing", [sys.executable, "-c", code], url, tmp_path / "thing.log", ROOT)


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_ready_means_the_address_answers(tmp_path: Path) -> None:
    port = free_port()
    thing = Service(
        "thing", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)],
        f"http://127.0.0.1:{port}", tmp_path / "thing.log", tmp_path,
    )  # fmt: skip
    thing.start()
    try:
        thing.wait_ready(20)
    finally:
        thing.stop()
    assert thing.process is not None and thing.process.returncode == -signal.SIGTERM


def test_a_dead_process_tells_its_last_words(tmp_path: Path) -> None:
    thing = service(tmp_path, "print('no disk left'); raise SystemExit(7)", "http://127.0.0.1:9")
    thing.start()
    with pytest.raises(ServiceError, match=r"exit code 7:\nno disk left"):
        thing.wait_ready(20)


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    thing = service(
        tmp_path,
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(600)",
    )
    thing.start()
    deadline = time.monotonic() + 10
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thing.stop(timeout=0.2)
    assert thing.process is not None and thing.process.returncode == -signal.SIGKILL


def test_children_go_when_the_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipelines.processes import Service;"
        "s = Service('thing', [sys.executable, '-c', 'import time; time.sleep(600)'], None, "
        f"Path({str(tmp_path)!r}) / 'log', Path('.')); s.start(); print(s.process.pid, flush=True);"
        "time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(child)
