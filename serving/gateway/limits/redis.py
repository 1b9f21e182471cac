"""Limits of workers on many machines: one Lua script in Redis a decision, one a settlement.

Windows and days run on the Redis server's clock, so a machine whose clock is wrong mints nothing.
How much survives a restart of Redis is its own configuration's to say (appendonly yes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from serving.gateway.limits.account import Refusal
from serving.gateway.limits.config import Limits, Rules
from serving.gateway.limits.shared import (
    Accounts,
    Granted,
    Settlement,
    SharedLimiter,
    StoreDown,
)
from serving.gateway.metrics import Metrics

HERE = Path(__file__).parent
PREFIX = "ratchet:limits:"
MAX_CONNECTIONS = 64
T = TypeVar("T")


class RedisLimiter(SharedLimiter):
    """See SharedLimiter.

    Args:
        config: the limits and the deadline.
        metrics: see SharedLimiter.
        url: redis://, rediss:// or unix://.
        prefix: of every key, so that several gateways may share a server.
    """

    def __init__(self, config: Limits, metrics: Metrics, url: str, *, prefix: str = PREFIX) -> None:
        super().__init__(config, metrics)
        self._prefix = prefix
        seconds = config.timeout_ms / 1000
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=seconds,
            socket_connect_timeout=max(0.5, seconds),
            socket_timeout=max(1.0, seconds),
            retry=Retry(NoBackoff(), 0),  # a deadline and a breaker stand around every call
        )
        self._client = aioredis.Redis(connection_pool=pool)
        common = (HERE / "redis.lua").read_text(encoding="utf-8")
        self._scripts = {
            name: common + (HERE / f"{name}.lua").read_text(encoding="utf-8")
            for name in ("reserve", "settle")
        }
        self._digests: dict[str, str] = {}

    async def _reserve(
        self, name: str, accounts: Accounts, tokens: int, money: int
    ) -> Granted | Refusal:
        values: list[Any] = [name, self._ttl, tokens, money]
        for _, rules in accounts:
            values += [
                round(rules.window * 1000),
                *(
                    "" if value is None else value
                    for value in (
                        rules.requests,
                        rules.tokens,
                        rules.concurrent,
                        rules.day,
                        rules.month,
                    )
                ),
                int(_budget(rules)),
            ]
        keys = self._keys(accounts)
        answer = await self._guarded(lambda: self._script("reserve", keys, values))
        if answer[0] == 1:
            return Granted(int(answer[1]), int(answer[2]))
        _, index, limit, wait = answer
        scope = accounts[int(index) - 1][1].scope
        return Refusal(limit.decode(), scope, None if wait < 0 else wait / 1000)

    async def _settle(self, batch: list[Settlement]) -> None:
        async def send(several: list[Settlement]) -> list[Settlement]:
            """Send all in one go; give those that met a server without the script."""
            digest = await self._digest("settle")
            async with self._client.pipeline(transaction=False) as pipe:
                for one in several:
                    values: list[Any] = [one.lease, self._ttl, one.tokens, one.money]
                    values.append(int(one.again))
                    for _, rules in one.accounts:
                        values += [round(rules.window * 1000), int(_budget(rules))]
                    keys = self._keys(one.accounts)
                    pipe.evalsha(digest, len(keys), *keys, *values)
                answers = await pipe.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception) and not isinstance(answer, NoScriptError):
                    raise answer
            return [
                one
                for one, answer in zip(several, answers, strict=True)
                if isinstance(answer, NoScriptError)
            ]

        async def all_of_it() -> None:
            waiting = batch
            while waiting := await send(waiting):
                self._digests.clear()

        await self._guarded(all_of_it)

    async def _renew(self, leases: dict[str, Accounts]) -> None:
        async def send() -> None:
            seconds, micros = await self._client.time()
            expires = seconds * 1000 + micros // 1000 + self._ttl
            async with self._client.pipeline(transaction=False) as pipe:
                for lease, accounts in leases.items():
                    for name, rules in accounts:
                        key = self._prefix + name
                        pipe.zadd(f"{key}:l", {lease: expires}, xx=True)
                        ends = round(2000 * rules.window) + 2 * self._ttl
                        pipe.pexpire(f"{key}:l", ends, gt=True)
                        pipe.pexpire(f"{key}:m", ends, gt=True)
                await pipe.execute()

        await self._guarded(send)

    async def _probe(self) -> None:
        # What is idle in the pool was connected to the server before it went away.
        await self._client.connection_pool.disconnect(inuse_connections=False)
        self._digests.clear()
        for name in self._scripts:
            await self._guarded(lambda name=name: self._digest(name))  # type: ignore[misc]

    async def _disconnect(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    @property
    def _ttl(self) -> int:
        """Milliseconds that a lease lives without renewal."""
        return round(self._config.lease_seconds * 1000)

    def _keys(self, accounts: Accounts) -> list[str]:
        return [f"{self._prefix}{name}:{part}" for name, _ in accounts for part in "wlm"]

    async def _digest(self, name: str) -> str:
        """The digest of a script that the server has."""
        if name not in self._digests:
            text = self._scripts[name]
            await self._client.script_load(text)
            self._digests[name] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return self._digests[name]

    async def _script(self, name: str, keys: list[str], values: list[Any]) -> Any:
        """Run a script by its digest; one that the server forgot is loaded and run."""
        try:
            digest = await self._digest(name)
            return await self._client.evalsha(digest, len(keys), *keys, *values)
        except NoScriptError:
            self._digests.pop(name, None)
            digest = await self._digest(name)
            return await self._client.evalsha(digest, len(keys), *keys, *values)

    async def _guarded(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        except (RedisError, OSError) as error:
            raise StoreDown(str(error) or type(error).__name__) from None


def _budget(rules: Rules) -> bool:
    return rules.day is not None or rules.month is not None
