"""Processes that run Presidio, each with one task at a time and a deadline.

A recogniser with a model takes tens of milliseconds and holds the interpreter, so it never runs in
the gateway's process. A worker that misses its deadline is killed and replaced: its result would
come too late, and a text that it hangs on must not take the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from contracts.errors import ConfigError, ServiceError
from resources.recognisers.spans import Found
from serving.gateway.guards.policy import PresidioConfig

log = logging.getLogger("ratchet.gateway.guards")
COMMAND = (sys.executable, "-m", "serving.gateway.guards.presidio_worker")
_LINE = 64 << 20


def require_presidio() -> None:
    """Raises ConfigError where it is configured and not installed."""
    if importlib.util.find_spec("presidio_analyzer") is None:
        raise ConfigError(
            "A guard policy asks for the engine presidio, which is not installed.",
            where="guards.policies, engine: presidio",
            next="pip install .[presidio] and a spaCy pipeline, or use engine: patterns",
        )


class Pool:
    """``await start()``, ``await find(texts, seconds)``, ``await close()``."""

    def __init__(self, config: PresidioConfig, command: Sequence[str] = COMMAND) -> None:
        self._config, self._command = config, command
        self._idle: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
        self._all: set[asyncio.subprocess.Process] = set()
        self._replacing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the workers. Raises ServiceError when one cannot work; then none is left."""
        tasks = [asyncio.ensure_future(self._add()) for _ in range(self._config.workers)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()
            raise

    async def find(self, texts: list[str], seconds: float) -> list[list[Found]]:
        """The findings of each text. Raises TimeoutError, also when no worker is free in time, and
        ServiceError when the worker died."""
        async with asyncio.timeout(seconds):
            worker = await self._idle.get()
            try:
                answer = await _asked(worker, {"texts": texts})
            except BaseException:
                self._replace(worker)
                raise
            self._idle.put_nowait(worker)
        return [[Found(*span) for span in spans] for spans in answer["spans"]]

    async def close(self) -> None:
        for task in list(self._replacing):
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        for worker in list(self._all):
            await self._end(worker)

    async def _add(self) -> None:
        worker = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what it prints may hold people's words
            limit=_LINE,
        )
        self._all.add(worker)
        try:
            async with asyncio.timeout(self._config.start_seconds):
                answer = await _asked(worker, self._config.model_dump(mode="json"))
        except TimeoutError:
            await self._end(worker)
            raise ServiceError(
                f"Presidio did not start within {self._config.start_seconds:g} s.",
                where="guards.presidio.start_seconds",
                next="allow it more seconds, or name a smaller spaCy pipeline",
            ) from None
        except BaseException:
            await self._end(worker)
            raise
        if "error" in answer:
            await self._end(worker)
            raise ServiceError(
                f"Presidio does not start: {answer['error']}",
                where="guards.presidio",
                next="install the spaCy pipeline that guards.presidio.model names",
            )
        self._idle.put_nowait(worker)

    def _replace(self, worker: asyncio.subprocess.Process) -> None:
        task = asyncio.ensure_future(self._replaced(worker))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replaced(self, worker: asyncio.subprocess.Process) -> None:
        await self._end(worker)
        wait = 1.0
        while True:
            try:
                return await self._add()
            except (ServiceError, OSError) as error:
                log.error("a worker of Presidio cannot be replaced: %s", type(error).__name__)
            await asyncio.sleep(wait)
            wait = min(60.0, wait * 2)

    async def _end(self, worker: asyncio.subprocess.Process) -> None:
        self._all.discard(worker)
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()


async def _asked(worker: asyncio.subprocess.Process, question: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        await worker.stdin.drain()
        line = await worker.stdout.readline()
    except ConnectionError:
        line = b""
    if not line:
        raise ServiceError("A worker of Presidio ended.", where="guards.presidio")
    answer: dict[str, Any] = json.loads(line)
    return answer
