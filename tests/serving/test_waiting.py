"""Deadlines without timers, and the client's leaving without a task."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving.gateway.body import Disconnected, WhileConnected
from serving.gateway.waiting import within

Timers = list[float]


def run(work: Callable[[], Awaitable[Any]]) -> tuple[Any, Timers]:
    """The result, and the delays of the timers that were armed."""
    timers: Timers = []

    async def counted() -> Any:
        loop = asyncio.get_running_loop()
        original = loop.call_at

        def call_at(when: float, *args: Any, **more: Any) -> Any:
            timers.append(when - loop.time())
            return original(when, *args, **more)

        loop.call_at = call_at  # type: ignore[method-assign]
        return await work()

    return asyncio.run(counted()), timers


def test_what_does_not_wait_arms_no_timer() -> None:
    async def at_once() -> int:
        return 7

    assert run(lambda: within(5, at_once())) == (7, [])


def test_what_waits_gets_its_result_and_its_deadline() -> None:
    async def waits() -> str:
        found = []
        for number in range(3):
            await asyncio.sleep(0)
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, number)
            found.append(await future)
        return str(found)

    found, timers = run(lambda: within(5, waits()))
    assert found == "[0, 1, 2]"
    assert [round(seconds) for seconds in timers] == [5]


def test_the_deadline_ends_the_work_and_its_finally_runs() -> None:
    ended: list[str] = []

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("finally")

    with pytest.raises(TimeoutError):
        run(lambda: within(0.01, hangs()))
    assert ended == ["finally"]


def test_errors_and_cancellation_pass_through() -> None:
    async def fails(first: bool) -> None:
        if not first:
            await asyncio.sleep(0)
        raise OSError("broken")

    for first in (True, False):
        with pytest.raises(OSError, match="broken"):
            asyncio.run(within(5, fails(first)))

    async def cancelled() -> str:
        task = asyncio.create_task(within(5, asyncio.Event().wait()))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return "cancelled" if task.cancelled() else "not"

    assert asyncio.run(cancelled()) == "cancelled"


class Client:
    """ASGI's receive of a client that leaves when it is told to."""

    def __init__(self) -> None:
        self.gone, self.asked, self.closed = asyncio.Event(), 0, 0

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        try:
            await self.gone.wait()
        except GeneratorExit:
            self.closed += 1
            raise
        return {"type": "http.disconnect"}


def test_a_client_that_leaves_cancels_the_work() -> None:
    async def work() -> str:
        client = Client()
        asyncio.get_running_loop().call_later(0.01, client.gone.set)
        try:
            async with WhileConnected({}, client.receive, lambda: False):
                await asyncio.Event().wait()
        except Disconnected:
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0
            return "disconnected"
        return "went on"

    assert asyncio.run(work()) == "disconnected"


def test_a_client_that_stays_leaves_nothing_behind() -> None:
    async def work() -> tuple[int, int]:
        client = Client()
        async with WhileConnected({}, client.receive, lambda: False):
            await asyncio.sleep(0)
        client.gone.set()
        await asyncio.sleep(0)
        return client.closed, len(asyncio.all_tasks())

    assert asyncio.run(work()) == (1, 1)


def test_a_client_that_leaves_as_the_work_ends_changes_nothing() -> None:
    """The call that tells it is scheduled already and comes too late."""
    complaints: list[Any] = []

    async def work() -> str:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        client = Client()
        async with WhileConnected({}, client.receive, lambda: False):
            await asyncio.sleep(0)
            client.gone.set()
        await asyncio.sleep(0.01)
        return "whole"

    assert asyncio.run(work()) == "whole"
    assert complaints == []


def test_a_server_that_says_gone_after_the_answer_changes_nothing() -> None:
    async def work() -> str:
        client = Client()
        client.gone.set()
        async with WhileConnected({}, client.receive, lambda: True):
            await asyncio.sleep(0)
        return "whole"

    assert asyncio.run(work()) == "whole"
