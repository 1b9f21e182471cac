"""One asker for the same request at the same time; the others wait for what it gets.

The first to ask leads. What it gets goes to all who wait; when it fails or its client leaves, the
next in line leads; when it gets what nobody else may have, all go alone. Nobody waits longer than
``wait_seconds``, and behind a leader that has taken longer than that nobody queues any more: the
next one leads anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lead(Generic[T]):
    """The place at the head of a line. Exactly one of the Flights' ``land``, ``fail`` and
    ``scatter`` ends it; later calls do nothing."""

    __slots__ = ("key", "open", "since", "waiting")

    def __init__(self, key: bytes, since: float) -> None:
        self.key, self.since, self.open = key, since, True
        self.waiting: deque[asyncio.Future[T | Lead[T] | None]] | None = None


class Flights(Generic[T]):
    """All lines of this process; one event loop."""

    def __init__(self, wait_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.wait_seconds, self._clock = wait_seconds, clock
        self._leads: dict[bytes, Lead[T]] = {}

    def __len__(self) -> int:
        return len(self._leads)

    def lead(self, key: bytes) -> Lead[T] | None:
        """The head of the line, if nobody has it; else call :meth:`wait`."""
        now = self._clock()
        there = self._leads.get(key)
        if there is not None and now - there.since <= self.wait_seconds:
            return None
        mine = self._leads[key] = Lead(key, now)
        return mine

    async def wait(self, key: bytes) -> T | Lead[T] | None:
        """What the leader got; the head of the line when it failed; None: go alone."""
        lead = self._leads[key]
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T | Lead[T] | None] = loop.create_future()
        if lead.waiting is None:
            lead.waiting = deque()
        lead.waiting.append(future)
        timer = loop.call_later(self.wait_seconds, _give_up, future)
        try:
            return await future
        except asyncio.CancelledError:
            # The client left in the moment in which it was its turn.
            if future.done() and not future.cancelled() and isinstance(future.result(), Lead):
                self.fail(future.result())  # type: ignore[arg-type]
            raise
        finally:
            timer.cancel()

    def land(self, lead: Lead[T], value: T) -> None:
        """Everybody gets it."""
        for future in self._end(lead):
            if not future.done():
                future.set_result(value)

    def scatter(self, lead: Lead[T]) -> None:
        """Everybody asks alone, at once: the answer is for nobody else."""
        for future in self._end(lead):
            if not future.done():
                future.set_result(None)

    def fail(self, lead: Lead[T]) -> None:
        """The next in line leads, and the others stay behind it."""
        waiting = self._end(lead)
        while waiting:
            future = waiting.popleft()
            if future.done():
                continue
            there = self._leads.get(lead.key)
            if there is not None:  # somebody lead anew meanwhile
                waiting.appendleft(future)
                there.waiting = (there.waiting or deque()) + waiting
                return
            following: Lead[T] = Lead(lead.key, self._clock())
            following.waiting = waiting
            self._leads[lead.key] = following
            future.set_result(following)
            return

    def _end(self, lead: Lead[T]) -> deque[asyncio.Future[T | Lead[T] | None]]:
        if not lead.open:
            return deque()
        lead.open = False
        if self._leads.get(lead.key) is lead:
            del self._leads[lead.key]
        return lead.waiting or deque()


def _give_up(future: asyncio.Future[T | Lead[T] | None]) -> None:
    if not future.done():
        future.set_result(None)
