"""A deadline that costs nothing where nothing is waited for.

``asyncio.timeout`` arms a timer each time, 5 us with its context manager. Most reads of a body and
most writes to a client end at once, and a stream has one for each event.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; a timer is armed once it has to wait. Raises TimeoutError."""
    try:
        waits = work.send(None)
    except StopIteration as end:
        found: T = end.value
        return found
    async with asyncio.timeout(seconds):
        return await _rest(work, waits)


@types.coroutine
def _rest(work: Coroutine[Any, Any, T], waits: Any) -> Generator[Any, Any, T]:
    """Go on with a coroutine that waits for ``waits``: ``await work``, without its first step."""
    try:
        while True:
            try:
                value = yield waits
            except GeneratorExit:
                raise
            except BaseException as error:
                waits = work.throw(error)
            else:
                waits = work.send(value)
    except StopIteration as end:
        found: T = end.value
        return found
    finally:
        work.close()
