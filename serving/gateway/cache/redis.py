"""The tier that several workers share. An outage is a miss, never an error and never a wait.

A look-up has a deadline. The first failure opens a breaker: until a probe succeeds, every
``PROBE_SECONDS``, nothing is asked any more. Answers are written behind the requests, through a
bounded queue. The same task reads the list of announced purges every ``purges.LOOK_SECONDS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from serving.gateway.cache import purges
from serving.gateway.cache.answer import Answer
from serving.gateway.cache.purges import KEPT, Purge
from serving.gateway.cache.scope import Scope, tag

log = logging.getLogger("ratchet.gateway.cache")
PREFIX = "ratchet:cache:"
PROBE_SECONDS = 0.25
WAITING = 256
MAX_CONNECTIONS = 32


async def _nobody(told: list[bytes]) -> None:
    """Purges are of no interest."""


class RedisTier:
    """See above.

    Args:
        url: redis://, rediss:// or unix://.
        timeout_ms: of one look-up.
        heard: called with all announced purges, newest first, each time that they are read.
        failed: told of each outage that a request met: "get", "put".
    """

    def __init__(
        self,
        url: str,
        timeout_ms: int,
        heard: Callable[[list[bytes]], Awaitable[None]] = _nobody,
        failed: Callable[[str], None] = lambda what: None,
        prefix: str = PREFIX,
    ) -> None:
        self._prefix, self.timeout, self._heard = prefix, timeout_ms / 1000, heard
        self._failed = failed
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=self.timeout,
            socket_connect_timeout=max(0.5, self.timeout),
            socket_timeout=max(1.0, self.timeout),
            retry=Retry(NoBackoff(), 0),  # a deadline and a breaker stand around every call
        )
        self._client: Any = aioredis.Redis(connection_pool=pool)
        self._queue: deque[tuple[Scope, bytes, int]] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.up = False
        self._answered = self._complained = float("-inf")

    async def start(self) -> None:
        await self._look()
        self._tasks = [
            asyncio.create_task(self._tend(), name="tend-cache"),
            asyncio.create_task(self._write(), name="write-cache"),
        ]

    async def close(self) -> None:
        """Answers that wait to be written are given up: they are only a cache."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self._client.aclose()
            await self._client.connection_pool.disconnect()

    async def get(self, scope: Scope) -> tuple[Answer, float] | None:
        """The answer, and the seconds that it may still be used; None when there is none or Redis
        does not say."""
        if not self.up:
            return None
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                pipe = self._client.pipeline(transaction=False)
                name = self._name(scope)
                found, left = await pipe.get(name).pttl(name).execute()
        except (RedisError, OSError, TimeoutError) as error:
            # A deadline that is missed while others are answered is a busy machine.
            if self._answered <= asked:
                self._down(error)
            self._failed("get")
            return None
        self._answered = time.monotonic()
        if found is None or left <= 0:
            return None
        answer = _read(found)
        return None if answer is None else (answer, left / 1000)

    def put(self, scope: Scope, answer: Answer, ttl: float) -> bool:
        """Write it soon; false: dropped, because Redis is away or too many wait."""
        if not self.up or len(self._queue) >= WAITING:
            self._failed("put")
            return False
        self._queue.append((scope, _written(answer), max(1, round(ttl * 1000))))
        self._wake.set()
        return True

    async def flush(self) -> None:
        """Wait until everything is written, or Redis is down."""
        while self._queue and self.up:
            await asyncio.sleep(0.002)

    def forget(self, what: Purge) -> None:
        """Do not write what waits and is meant."""
        self._queue = deque(item for item in self._queue if not what.means(item[0]))

    async def purge(self, what: Purge, told: bytes) -> int:
        """Delete what is meant, and announce it. Raises RedisError or OSError: a purge that did
        not happen must be known."""
        count, batch = 0, []
        names = map(_or_any, (what.tenant, what.release, what.model))
        pattern = f"{self._prefix}a:{':'.join(names)}:*"
        async for name in self._client.scan_iter(match=pattern, count=1000):
            batch.append(name)
            if len(batch) == 500:
                count += await self._client.unlink(*batch)
                batch = []
        if batch:
            count += await self._client.unlink(*batch)
        pipe = self._client.pipeline(transaction=True)
        await pipe.lpush(self._purges, told).ltrim(self._purges, 0, KEPT - 1).execute()
        return count

    # -- behind the requests --------------------------------------------------------------------

    @property
    def _purges(self) -> str:
        return f"{self._prefix}purges"

    def _name(self, scope: Scope) -> str:
        release = tag(scope.target.partition("+")[0])
        names = f"{tag(scope.tenant)}:{release}:{tag(scope.model)}"
        return f"{self._prefix}a:{names}:{scope.key.hex()}"

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and self.up:
                batch = [self._queue.popleft() for _ in range(min(16, len(self._queue)))]
                try:
                    async with asyncio.timeout(max(1.0, self.timeout)):
                        pipe = self._client.pipeline(transaction=False)
                        for scope, value, ttl in batch:
                            pipe.set(self._name(scope), value, px=ttl)
                        await pipe.execute(raise_on_error=False)
                except (RedisError, OSError, TimeoutError) as error:
                    self._failed("put")
                    self._down(error)
            if not self.up:
                self._queue.clear()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(purges.LOOK_SECONDS if self.up else PROBE_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Whether Redis answers, and which purges there were."""
        try:
            async with asyncio.timeout(max(0.5, self.timeout)):
                if not self.up:  # what is idle in the pool belongs to the server that went away
                    await self._client.connection_pool.disconnect(inuse_connections=False)
                told = await self._client.lrange(self._purges, 0, -1)
        except (RedisError, OSError, TimeoutError) as error:
            self._down(error)
            return
        try:
            await self._heard(told)
        except Exception:  # a bug must not end the task
            log.exception("purges cannot be followed")
        if not self.up:
            self.up = True
            log.info("the shared cache answers")

    def _down(self, error: Exception) -> None:
        """Open the breaker. At most one line in ten seconds."""
        self.up = False
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.error("the shared cache is down: %s", str(error) or type(error).__name__)


def _or_any(name: str | None) -> str:
    return "*" if name is None else tag(name)


def _written(answer: Answer) -> bytes:
    head = [
        answer.prompt_tokens, answer.completion_tokens, answer.response_id, answer.text,
        answer.meta.decode("utf-8"),
    ]  # fmt: skip
    return orjson.dumps(head) + b"\n" + answer.body


def _read(value: bytes) -> Answer | None:
    """None for what no version of this code wrote."""
    head, found, body = value.partition(b"\n")
    try:
        prompt, completion, response_id, text, meta = orjson.loads(head)
        if not found or not body:
            return None
        return Answer(body, int(prompt), int(completion), response_id, text, meta.encode())
    except (ValueError, TypeError, AttributeError):
        return None
