"""Readiness that means tokens flow: the engine behind the channel is asked, not assumed.

Every two seconds the engine's health check; a one-token completion after each switch and whenever
nothing has come out of it for half a minute. ``problem`` is None when ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from serving.gateway.engine import EngineClient
from serving.gateway.live import LiveRelease
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.health")
EVERY_SECONDS = 2.0
TOKEN_SECONDS = 30.0


class Health:
    """Watches the engine of the live release.

    Args:
        live: whose engine.
        engine: asks it.
        metrics: ``ready`` follows the state.
    """

    def __init__(
        self,
        live: LiveRelease,
        engine: EngineClient,
        metrics: Metrics,
        every: float = EVERY_SECONDS,
    ) -> None:
        self._live, self._engine, self._metrics, self._every = live, engine, metrics, every
        self._problem: str | None = "the engine was not asked yet"
        self._url = ""
        self._token_at = 0.0

    @property
    def problem(self) -> str | None:
        """Why the gateway is not ready, or None. A switch that was not probed yet is not ready."""
        live = self._live.current
        if live is None:
            return self._live.problem
        if live.channel.engine_url != self._url:
            return "the engine was not asked yet"
        return self._problem

    async def watch(self) -> None:
        """Ask for ever; run as a task. A switch of the release is asked about at once."""
        while True:
            try:
                await self._ask()
            except Exception:
                log.exception("asking the engine failed")
            self._metrics.ready.set(self.problem is None)
            self._live.switched.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._live.switched.wait()

    async def _ask(self) -> None:
        live = self._live.current
        if live is None:
            return
        url, before = live.channel.engine_url, self._problem
        if url != self._url:
            self._token_at = 0.0
        problem = None
        if not await self._engine.healthy(url):
            problem, self._token_at = "the engine does not pass its health check", 0.0
        elif time.monotonic() - self._token_at > TOKEN_SECONDS or not self._token_at:
            if await self._engine.token(url, live.channel.model):
                self._token_at = time.monotonic()
            else:
                problem = "no token comes out of the engine"
        self._url, self._problem = url, problem
        if problem != before:
            log.info("engine %s: %s", url, problem or "tokens flow")
