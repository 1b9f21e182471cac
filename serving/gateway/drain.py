"""A bounded queue with one thread behind it: the event loop hands over and never waits.

``offer`` costs less than a microsecond. When the queue is full the newest item is dropped and
counted. The thread wakes every 20 ms and takes what is there at once: waking it for each item would
cost a switch of threads per request, which is more than the work itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from prometheus_client import Counter

T = TypeVar("T")
EVERY = 0.02


class Drain(Generic[T]):
    """See the module.

    Args:
        name: of the thread.
        take: is given what waited, oldest first, at most ``batch`` items; runs in the thread. An
            exception of it is logged (at most once in ten seconds) and loses these items; it counts
            them itself, because only it knows how many.
        dropped: counts what did not fit.
        limit: items that may wait.
        every: seconds between two wake-ups.
        turn: called by the thread at every wake-up, after the items.
        begin, end: called by the thread before and after everything else.
    """

    def __init__(
        self,
        name: str,
        take: Callable[[list[T]], None],
        dropped: Counter,
        *,
        limit: int,
        batch: int = 512,
        every: float = EVERY,
        turn: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self._take, self._dropped, self._turn = take, dropped, turn
        self._begin, self._end = begin, end
        self._limit, self._batch, self._every = limit, batch, every
        self._waiting = deque[T]()
        self._log = logging.getLogger(f"ratchet.gateway.{name.replace('-', '_')}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._complained = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def offer(self, item: T) -> bool:
        """Queue an item; False when it was dropped."""
        if len(self._waiting) >= self._limit:
            self._dropped.inc()
            return False
        self._waiting.append(item)
        return True

    def close(self, seconds: float = 10.0) -> None:
        """Let the thread take what waits and end it. Blocks for ``seconds`` at most; what then
        still waits is lost and counted."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        while self._waiting:
            self._dropped.inc()
            self._waiting.popleft()

    def _work(self) -> None:
        self._guarded(self._begin)
        while True:
            ends = self._stop.wait(self._every)
            while self._waiting:
                count = min(len(self._waiting), self._batch)
                items = [self._waiting.popleft() for _ in range(count)]
                self._guarded(lambda items=items: self._take(items))  # type: ignore[misc]
            self._guarded(self._turn)
            if ends:
                self._guarded(self._end)
                return

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do ``work``; a failure is logged and never ends the thread."""
        try:
            work()
        except Exception as error:
            self.complain(error)

    def complain(self, error: Exception) -> None:
        """At most one line in ten seconds: a full disk would fill the log as well. Without the
        traceback, and of errors that are not the disk's without their words: text of people may
        stand in them."""
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            words = error if isinstance(error, OSError) else type(error).__name__
            self._log.error("it cannot be written: %s", words)
