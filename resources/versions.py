"""What is published, and what ever was: the pointer, the versions, and their ledger.

Under ``<state>``:

    published_index.json         the pointer: which version, and which documents nobody may see
    indexes/<version>/           a whole index directory; the version is its content id, shortened
    indexes/versions.jsonl       the ledger: one line a change of the pointer, append-only, fsynced

The pointer is replaced in one step and carries its own line of the ledger. A process that dies
between the two leaves a pointer whose line is missing; the next one adds it first. A line that a
dying process left half-written has no newline at its end: it is cut off before the next is added.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contracts.errors import InputError, NotFoundError
from contracts.settings import Settings
from resources.index import MANIFEST

LEFTOVERS = ("*.part", "*.gone")


@dataclass(frozen=True)
class Store:
    """The folders and files of one checkout's published indexes."""

    settings: Settings

    @property
    def home(self) -> Path:
        return self.settings.state_dir / "indexes"

    @property
    def pointer(self) -> Path:
        return self.settings.state_dir / "published_index.json"

    @property
    def ledger(self) -> Path:
        return self.home / "versions.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; what a dead one left half-done is finished or removed first."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for pattern in LEFTOVERS:
                for item in self.home.glob(pattern):
                    shutil.rmtree(item, ignore_errors=True)
            self._recover()
            yield

    def read(self) -> dict[str, Any] | None:
        """The pointer with everything in it; None before the first publish."""
        try:
            value: dict[str, Any] = json.loads(self.pointer.read_text(encoding="utf-8"))
            if set(value) == {"md5", "path", "previous"}:
                return None  # written before there were versions: as if nothing was published
            _ = value["path"], value["version"], value["tombstones"], value["seq"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The pointer to the published index cannot be read: {error!r}.",
                where=str(self.pointer),
                next="delete it and publish again: `ratchet index publish`",
            ) from None
        return value

    def current(self) -> dict[str, Any]:
        """The pointer. Raises NotFoundError before the first publish."""
        value = self.read()
        if value is None:
            raise NotFoundError(
                "No index has been published yet.",
                where=str(self.pointer),
                next="materialize `published_index`, or run `make demo`",
            )
        return value

    def lines(self) -> list[dict[str, Any]]:
        """The ledger, oldest first, with the pointer's line where it is not written yet."""
        found = self._written()
        pointer = self.read()
        last = found[-1]["seq"] if found else 0
        return [*found, summary(pointer)] if pointer and pointer["seq"] > last else found

    def stored(self) -> list[str]:
        """Versions whose folder is there."""
        return sorted(item.parent.name for item in self.home.glob(f"*/{MANIFEST}"))

    def move(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Point at ``entry``: number and time are added, pointer first, then its ledger line."""
        entry = entry | self._stamp()
        part = self.pointer.with_suffix(".json.part")
        with part.open("w", encoding="utf-8") as stream:
            json.dump(entry, stream, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, self.pointer)
        sync_folder(self.pointer.parent)
        self._recover()
        return entry

    def note(self, event: dict[str, Any]) -> None:
        """Add a line about something else than the pointer."""
        self._append(event | self._stamp())

    def _stamp(self) -> dict[str, Any]:
        lines = self.lines()
        return {
            "seq": lines[-1]["seq"] + 1 if lines else 1,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _text(self) -> str:
        """The whole lines of the ledger."""
        with contextlib.suppress(FileNotFoundError):
            data = self.ledger.read_bytes()
            return data[: data.rfind(b"\n") + 1].decode()
        return ""

    def _written(self) -> list[dict[str, Any]]:
        """The whole lines as records. Raises InputError, which names every line that is none."""
        found: list[dict[str, Any]] = []
        wrong = []
        for number, line in enumerate(self._text().splitlines(), start=1):
            try:
                found.append(json.loads(line))
                _ = found[-1]["seq"], found[-1]["event"], found[-1]["version"]
            except (ValueError, KeyError, TypeError) as error:
                wrong.append(f"line {number}: {error!r}")
        if wrong:
            raise InputError(
                "The ledger of published versions is damaged; what is published stays so.",
                offenders=wrong,
                where=str(self.ledger),
                next="remove these lines, or bring the file back from a backup",
            )
        return found

    def _recover(self) -> None:
        whole = len(self._text().encode())
        if self.ledger.exists() and self.ledger.stat().st_size > whole:
            os.truncate(self.ledger, whole)
        pointer = self.read()
        lines = self._written()
        if pointer and pointer["seq"] > (lines[-1]["seq"] if lines else 0):
            self._append(summary(pointer))

    def _append(self, line: dict[str, Any]) -> None:
        with self.ledger.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def summary(pointer: dict[str, Any]) -> dict[str, Any]:
    """The pointer, its tombstones counted, not listed: a line of the ledger."""
    return {key: value for key, value in pointer.items() if key != "tombstones"} | {
        "hidden": len(pointer["tombstones"])
    }


def sync_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
