"""The tier in this process: the least recently used go first, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from serving.gateway.cache.answer import Answer
from serving.gateway.cache.purges import Purge
from serving.gateway.cache.scope import Scope

#: Entries that a purge looks at between two turns of the event loop: 0.1 ms.
SLICE = 500


class Entry:
    """One answer and when it ends, on the monotonic clock."""

    __slots__ = ("answer", "expires", "model", "size", "target", "tenant")

    def __init__(self, scope: Scope, answer: Answer, expires: float) -> None:
        self.answer, self.expires, self.size = answer, expires, answer.size
        self.model, self.target, self.tenant = scope.model, scope.target, scope.tenant


class MemoryTier:
    """All calls come from one event loop.

    Args:
        max_bytes: of all entries together.
        evicted: told why an entry left: "full", "expired" or "purged".
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_bytes: int,
        evicted: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._evicted, self._clock = evicted, clock
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= self._clock():
            self._drop(key, "expired")
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def put(self, scope: Scope, answer: Answer, ttl: float) -> None:
        """Keep an answer for ``ttl`` seconds; one that is larger than the whole tier is not."""
        old = self._entries.pop(scope.key, None)
        if old is not None:
            self.bytes -= old.size
        entry = Entry(scope, answer, self._clock() + ttl)
        if entry.size > self.max_bytes:
            return
        self._entries[scope.key] = entry
        self.bytes += entry.size
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)), "full")

    def configure(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        while self.bytes > max_bytes:
            self._drop(next(iter(self._entries)), "full")

    async def purge(self, what: Purge) -> int:
        """Forget what is meant; how many that was."""
        keys, count = list(self._entries), 0
        for number, key in enumerate(keys):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            entry = self._entries.get(key)
            if entry is not None and what.means(entry):
                self._drop(key, "purged")
                count += 1
        return count

    def _drop(self, key: bytes, reason: str) -> None:
        self.bytes -= self._entries.pop(key).size
        self._evicted(reason)
