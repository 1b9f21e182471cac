"""Records of running engines: ``<state>/engines/<release>.json``, one small JSON file each.

Written by the engine's own supervisor before it starts anything, so that an engine is on record
from its first moment, whoever started it and whatever became of that process.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources import processes


@dataclass(frozen=True)
class EngineRecord:
    """What is known of one engine. ``pid`` is its supervisor, ``engine_pid`` its session."""

    path: Path
    release: str
    state: str  # starting | ready
    pid: int
    ticks: int
    engine_pid: int
    port: int
    url: str
    model: str
    log: str

    @property
    def alive(self) -> bool:
        """Whether the supervisor on record still runs (its pid was not given to another)."""
        return processes.alive(self.pid, self.ticks)

    def leftovers(self) -> list[int]:
        """Processes of the engine's session that started after its supervisor did."""
        return processes.session_of(self.engine_pid, self.ticks) if self.engine_pid else []


def write_record(path: Path, facts: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_record(path: Path) -> EngineRecord | None:
    """The record, or None when it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return EngineRecord(
            path=path,
            release=str(data["release"]),
            state=str(data["state"]),
            pid=int(data["pid"]),
            ticks=int(data["ticks"]),
            engine_pid=int(data["engine_pid"]),
            port=int(data["port"]),
            url=str(data["url"]),
            model=str(data["model"]),
            log=str(data["log"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_records(folder: Path) -> list[EngineRecord]:
    """Every record in the folder, by name."""
    found = (read_record(path) for path in sorted(folder.glob("[0-9a-zA-Z]*.json")))
    return [record for record in found if record is not None]


def stop(record: EngineRecord, grace: float = 20.0) -> bool:
    """End that engine and what is left of it; say whether anything had to be ended.

    A pid that was given to another process since is never signalled.
    """
    acted = False
    if record.alive:
        acted = True
        processes.send(record.pid, signal.SIGTERM)
        if not processes.wait_until(lambda: not record.alive, grace):
            processes.send(record.pid, signal.SIGKILL)
            processes.wait_until(lambda: not record.alive, 5.0)
    if record.leftovers():  # the supervisor was killed, and perhaps the API server with it
        acted = True
        processes.end_session(record.engine_pid, record.ticks, 5.0)
    current = read_record(record.path)
    if current is None or (current.pid, current.ticks) == (record.pid, record.ticks):
        record.path.unlink(missing_ok=True)
    return acted
