"""Who was refused what, and what guards found: append-only lines, one file a UTC day.

In: ended exchanges and events of the gateway itself. Out: ``<state>/audit/<YYYY-MM-DD>.jsonl``
(mode 0600), one JSON object a line with ``time`` and ``event``:

* ``guard``: one side's verdict: findings by guard, kind, place and rule version.
* ``late``: the same of guards in mode async; only ``response_id`` says of which request.
* ``refused``: a request that a key or a limit ended, with the error's code.
* ``more``: how many refusals of that code were not written, because a flood of wrong keys would
  fill the disk.
* ``config_taken``, ``config_refused``, ``started``, ``stopped``: the gateway's own.

Ids, codes and places only: no text of people, no key. A line is in the file 20 ms after its
event, whole or not at all, whatever other workers append (a lock and one write); it is synced to
the disk within a second, so a crash of the machine loses one second and one of the gateway 20 ms.
Nothing here ever changes a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from serving.gateway.drain import Drain
from serving.gateway.metrics import Metrics

if TYPE_CHECKING:
    from serving.gateway.exchange import Exchange
    from serving.gateway.guards.verdict import Verdict

#: Codes of requests that a key or a limit refused.
REFUSALS = frozenset(
    {"invalid_api_key", "keys_unavailable", "model_not_found", "rate_limit_exceeded",
     "budget_exceeded", "limits_unavailable", "context_length_exceeded"}
)  # fmt: skip
#: Refusals of one code that are written each second; the others are counted.
EACH_SECOND = 50
SYNC_SECONDS = 1.0


class AuditLog:
    """See the module.

    Args:
        folder: ``<state>/audit``.
        metrics: counts lines and drops.
        limit: events that may wait.
    """

    def __init__(self, folder: Path, metrics: Metrics, *, limit: int = 10_000) -> None:
        self._folder, self._metrics = folder, metrics
        self._day, self._handle = "", -1
        self._dirty, self._synced = False, time.monotonic()
        self._refused: dict[str, int] = {}  # in this second, by code
        self._second = 0
        self._drain: Drain[dict[str, Any]] = Drain(
            "audit-log",
            self._write,
            metrics.audit_dropped,
            limit=limit,
            turn=self._tend,
            end=self._end,
        )
        self.start = self._drain.start

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits, sync and end. Blocks; call it off the event loop."""
        self._drain.close(seconds)

    def event(self, name: str, **fields: str | int | float) -> None:
        """Something that the gateway did."""
        self._drain.offer({"time": _now(), "event": name, **fields})

    def late(self, response_id: str, verdict: Verdict) -> None:
        """What guards in mode async found; the request log knows whose request it was."""
        if record := verdict.record():
            whose = {"time": _now(), "response_id": response_id}
            self._drain.offer({**whose, "event": "late", **record})

    def ended(self, exchange: Exchange) -> None:
        """Note what guards, keys and limits said of a request that has ended."""
        error = exchange.error
        refused = error is not None and error.code in REFUSALS
        if not (refused or exchange.verdicts):
            return
        principal = exchange.principal
        whose = {
            "time": _now(),
            "response_id": exchange.response_id,
            "tenant": principal.tenant if principal else "",
            "key_id": principal.key_id if principal else "",
        }
        for verdict in exchange.verdicts:
            record = verdict.record()
            if record:
                self._drain.offer({**whose, "event": "guard", **record})
        if error is not None and refused and self._may(error.code):
            self._drain.offer({**whose, "event": "refused", "code": error.code})

    def _may(self, code: str) -> bool:
        """Whether a refusal of this code is written; the event loop only."""
        second = int(time.monotonic())
        if second != self._second:
            for name, count in self._refused.items():
                if count > EACH_SECOND:
                    self.event("more", code=name, count=count - EACH_SECOND)
            self._refused.clear()
            self._second = second
        count = self._refused[code] = self._refused.get(code, 0) + 1
        return count <= EACH_SECOND

    def _write(self, events: list[dict[str, Any]]) -> None:
        """Whole lines, those of one day in one write."""
        done = 0
        try:
            while done < len(events):
                day = events[done]["time"][:10]
                lines: list[bytes] = []
                while done + len(lines) < len(events):
                    event = events[done + len(lines)]
                    if event["time"][:10] != day:
                        break
                    lines.append(orjson.dumps(event) + b"\n")
                self._append(day, b"".join(lines))
                done += len(lines)
                self._metrics.audit_rows.inc(len(lines))
        except Exception:
            self._metrics.audit_dropped.inc(len(events) - done)
            raise

    def _append(self, day: str, lines: bytes) -> None:
        if day != self._day:
            self._close()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{day}.jsonl"
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._day = day
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            before = os.fstat(self._handle).st_size
            if os.write(self._handle, lines) < len(lines):  # a full disk can take half of it
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, before)
                raise OSError(28, "No space left on device")
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        self._dirty = True

    def _tend(self) -> None:
        if self._dirty and time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._handle)
            self._dirty, self._synced = False, time.monotonic()

    def _end(self) -> None:
        for name, count in self._refused.items():
            if count > EACH_SECOND:
                self._write([{"time": _now(), "event": "more", "code": name,
                              "count": count - EACH_SECOND}])  # fmt: skip
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
                self._handle, self._day, self._dirty = -1, "", False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
