"""What guards in mode async look at: when the answer is on its way, by one task, only to report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serving.gateway.guards.verdict import Verdict
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.guards")
Look = Callable[[], Awaitable[Verdict]]


class Later:
    """A bounded queue and the task that works on it.

    Args:
        limit: looks that may wait; more are dropped and counted.
        metrics: drops and failures.
        done: told (response id, verdict) of each; never blocks.
    """

    def __init__(self, limit: int, metrics: Metrics, done: Callable[[str, Verdict], None]) -> None:
        self._metrics, self._done = metrics, done
        self._queue: asyncio.Queue[tuple[str, Look]] = asyncio.Queue(limit)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """What still waits is dropped."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._metrics.guard_dropped.inc(self._queue.qsize())

    def put(self, response_id: str, look: Look) -> None:
        """Soon; never waits."""
        try:
            self._queue.put_nowait((response_id, look))
        except asyncio.QueueFull:
            self._metrics.guard_dropped.inc()

    async def _run(self) -> None:
        while True:
            response_id, look = await self._queue.get()
            try:
                self._done(response_id, await look())
            except Exception as error:
                log.error("a guard out of band failed: %s", type(error).__name__)
                self._metrics.guard_failures.labels("async", "error", "open").inc()
            await asyncio.sleep(0)
