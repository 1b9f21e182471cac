"""From the event loop to the request log through a bounded queue: an answer never waits for a disk.

``offer`` costs microseconds and never blocks: when the queue is full, or the disk refuses a record,
the record is dropped and counted. One thread empties the queue into resources.requests.DayWriter.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from contracts.records import RequestRecord
from resources.requests import DayWriter, recover
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.request_log")


class RequestLog:
    """The bounded queue and its writer thread.

    Args:
        folder: ``Settings.requests_dir``.
        metrics: counts rows, drops and the queue's depth.
        limit: records that may wait.
    """

    def __init__(self, folder: Path, metrics: Metrics, *, limit: int = 10_000) -> None:
        self._folder, self._metrics = folder, metrics
        self._queue: queue.Queue[RequestRecord | None] = queue.Queue(limit)
        self._writer = DayWriter(folder)
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._complained = 0.0
        metrics.log_queue.set_function(self._queue.qsize)

    def start(self) -> None:
        self._thread.start()

    def offer(self, record: RequestRecord) -> bool:
        """Queue a record; False when it was dropped."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._metrics.log_dropped.inc()
            return False
        return True

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits and end the thread. Blocks; call it off the event loop."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            recover(self._folder)  # journals of a gateway that was killed
        except Exception as error:  # old files must not keep the new ones from being written
            self._complain(error)
        while True:
            try:
                record = self._queue.get(timeout=0.25)
            except queue.Empty:
                self._guarded(self._writer.tend)
                continue
            if record is None:
                self._guarded(self._writer.close)
                return
            if self._guarded(functools.partial(self._writer.append, [record])):
                self._metrics.log_rows.inc()
            else:
                self._metrics.log_dropped.inc()
            self._guarded(self._writer.tend)

    def _guarded(self, work: Callable[[], None]) -> bool:
        """Do ``work``; a failure is logged and never ends the thread."""
        try:
            work()
        except Exception as error:
            self._complain(error)
            return False
        return True

    def _complain(self, error: Exception) -> None:
        """At most one line in ten seconds: a full disk would fill the log as well."""
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.error("the request log cannot be written: %s", error)
