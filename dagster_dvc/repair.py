"""What a killed process leaves behind, outside of the project's own files.

In: the ``.dvc`` folder, or the token of a run. Out: no leftover process, no entry that blocks DVC.
DVC notes who reads and writes what in ``.dvc/tmp/rwlock``. It drops entries whose PID is gone
itself; it does not survive a table that a kill cut short, and a PID that was given to another
program would block it for ever.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .hashing import directory_entries, md5_of_file

TOKEN = "DAGSTER_DVC_TOKEN"  # in the environment of every process of a run


def _processes_with(token: str) -> list[int]:
    """Living processes that carry the token in their environment (Linux)."""
    found = []
    needle = f"{TOKEN}={token}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) != os.getpid():
            with suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def end_processes(token: str) -> None:
    """SIGKILL what survived the supervisor (it was itself SIGKILLed, or this is no Linux)."""
    deadline = time.monotonic() + 10.0
    while (alive := _processes_with(token)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


@contextmanager
def _table(dvc_dir: Path) -> Iterator[Path]:
    """DVC's table, under DVC's own guard for it (an flock that DVC holds for milliseconds)."""
    guard = os.open(dvc_dir / "tmp" / "rwlock.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield dvc_dir / "tmp" / "rwlock"
    finally:
        os.close(guard)


def _damaged(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def remove_damaged_table(dvc_dir: Path) -> bool:
    """Remove a table that is no JSON: DVC refuses to work until somebody deletes it.

    Returns:
        Whether there was one.
    """
    if not _damaged(dvc_dir / "tmp" / "rwlock"):
        return False
    with _table(dvc_dir) as table:  # it may have been half written, not damaged
        if not _damaged(table):
            return False
        table.unlink()
        return True


def drop_dead_entries(dvc_dir: Path) -> None:
    """Remove entries of processes that are gone, or whose PID belongs to another program now."""
    with _table(dvc_dir) as table:
        try:
            entries = json.loads(table.read_text())
        except (OSError, ValueError):
            return
        write = {path: who for path, who in entries.get("write", {}).items() if _alive(who)}
        read = {
            path: alive
            for path, readers in entries.get("read", {}).items()
            if (alive := [who for who in readers if _alive(who)])
        }
        kept = {"write": write, "read": read}
        if kept != {"write": entries.get("write", {}), "read": entries.get("read", {})}:
            table.write_text(json.dumps(kept))


def _alive(who: Mapping[str, Any]) -> bool:
    """Whether an entry's process lives and is the one that wrote it (unknown counts as yes)."""
    pid = int(who.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return True
    if state[0] == "Z":
        return False
    # DVC writes down its sys.argv joined by blanks. Its program looks otherwise here ("-m dvc") and
    # may have blanks itself, so the process's last arguments are looked for at the command's end.
    told = str(who.get("cmd", ""))
    words = command.decode(errors="replace").rstrip("\0").split("\0")
    tails = (" ".join(words[first:]) for first in range(1, len(words)))
    return told in words or any(told.endswith(f" {tail}") for tail in tails)


def drop_damaged_objects(cache: Path, md5s: Iterable[str]) -> list[str]:
    """Remove cached objects whose bytes are not what their name says.

    DVC trusts an object that is write-protected, as all of its own are, and would copy damaged
    bytes into the workspace as the stage's output.

    Args:
        cache: DVC's folder of file objects (``.dvc/cache/files/md5``).
        md5s: of files and folders (``….dir``), whose files are looked at too.

    Returns:
        The hashes of the objects that were removed.
    """
    dropped: list[str] = []
    for md5 in md5s:
        inside = (directory_entries(cache, md5) or {}) if md5.endswith(".dir") else {}
        for name in dict.fromkeys([md5, *inside.values()]):
            path = cache / name[:2] / name[2:]
            if path.is_file() and md5_of_file(path) != name.removesuffix(".dir"):
                path.unlink()
                dropped.append(name)
    return dropped
