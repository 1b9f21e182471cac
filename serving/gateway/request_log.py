"""From the event loop to the request log through a bounded queue: an answer never waits for a disk.

When the queue is full, or the disk refuses a record, the record is dropped and counted. One thread
masks what people must not find in a log and hands the rows to resources.request_writer.DayWriter.
A row has the fields of contracts.records.RequestRecord; making one of those, with its checks, would
cost more than everything else here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from resources.request_writer import DayWriter, recover
from serving.gateway.drain import Drain
from serving.gateway.masking import masked
from serving.gateway.metrics import Metrics
from serving.gateway.telemetry.recorder import FEATURE, OTHER


class Logs(BaseModel):
    """The block ``logs`` of the gateway's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    content: bool = False  # texts of plain models too; those of releases are kept for evaluation


class RequestLog:
    """The bounded queue and its writer thread.

    Args:
        folder: ``Settings.requests_dir``.
        metrics: counts rows, drops and the queue's depth.
        limit: rows that may wait.
    """

    def __init__(self, folder: Path, metrics: Metrics, *, limit: int = 10_000) -> None:
        self._folder, self._metrics = folder, metrics
        self._writer = DayWriter(folder)
        self._drain: Drain[dict[str, Any]] = Drain(
            "request-log",
            self._write,
            metrics.log_dropped,
            limit=limit,
            turn=self._writer.tend,
            begin=self._recover,
            end=self._writer.close,
        )
        self.start, self.offer = self._drain.start, self._drain.offer
        metrics.log_queue.set_function(self._drain.__len__)

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits and end the thread. Blocks; call it off the event loop."""
        self._drain.close(seconds)

    def _recover(self) -> None:
        recover(self._folder)  # journals of a gateway that was killed

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """All at once; when that fails, one by one, so that one bad row costs only itself."""
        before = self._writer.written
        try:
            self._writer.append([clean(row) for row in rows])
        except Exception as error:
            rest = rows[self._writer.written - before :]
            if len(rest) == 1:
                self._metrics.log_dropped.inc()
                self._drain.complain(error)
            else:
                for row in rest:
                    self._write([row])
            rows = rows[: len(rows) - len(rest)]
        if rows:
            self._metrics.log_rows.inc(len(rows))


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """The row without personal data and secrets in what people wrote. A feature that is no name as
    keys have them is OTHER, as in the metrics: free text would be another place for words."""
    for name in ("question", "answer"):
        if row[name]:
            row[name] = masked(row[name])
    if row["feature"] and not FEATURE.fullmatch(row["feature"]):
        row["feature"] = OTHER
    return row
