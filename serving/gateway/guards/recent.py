"""Values that are dear to make, remembered while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """The ``count`` values that were asked for last. Keys are hashes: no text is held for them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._known: OrderedDict[bytes, V] = OrderedDict()

    def get(self, key: bytes, make: Callable[[], V]) -> V:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._known[key] = make()
        if len(self._known) > self._count:
            self._known.popitem(last=False)
        return found
