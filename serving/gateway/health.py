"""Readiness that means tokens flow: the engine behind the channel is asked, not assumed.

Every two seconds the engine's health check; a one-token completion after each switch and whenever
nothing has come out of it for half a minute. ``problem`` is None when ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import orjson

from serving.gateway.endpoint import Endpoint, Timeouts
from serving.gateway.live import LiveRelease
from serving.gateway.metrics import Metrics
from serving.gateway.upstream import UpstreamClient
from serving.gateway.upstream_errors import UpstreamError

log = logging.getLogger("ratchet.gateway.health")
EVERY_SECONDS = 2.0
TOKEN_SECONDS = 30.0
#: Seconds for an answer: of the engine's own health check, and of one token.
HEALTH_PATIENCE, TOKEN_PATIENCE = 2.0, Timeouts(unstreamed=30)


class Health:
    """Watches the engine of the live release.

    Args:
        live: whose engine.
        client: asks it.
        metrics: ``ready`` follows the state.
    """

    def __init__(
        self,
        live: LiveRelease,
        client: UpstreamClient,
        metrics: Metrics,
        every: float = EVERY_SECONDS,
    ) -> None:
        self._live, self._client, self._metrics, self._every = live, client, metrics, every
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
        if await self._client.get(f"{url}/health", HEALTH_PATIENCE) is None:
            problem, self._token_at = "the engine does not pass its health check", 0.0
        elif time.monotonic() - self._token_at > TOKEN_SECONDS or not self._token_at:
            if await self._token(url, live.channel.model):
                self._token_at = time.monotonic()
            else:
                problem = "no token comes out of the engine"
        self._url, self._problem = url, problem
        if problem != before:
            log.info("engine %s: %s", url, problem or "tokens flow")

    async def _token(self, url: str, model: str) -> bool:
        """Whether a token comes out: the only health that means anything to a user."""
        body = {
            "model": model,
            "max_tokens": 1,
            "temperature": 0,
            "messages": [{"role": "user", "content": "ping"}],
        }
        endpoint = Endpoint("probe", url, model, "vllm", timeouts=TOKEN_PATIENCE)
        try:
            answer = await self._client.open(endpoint, "chat", orjson.dumps(body), {}, False)
        except UpstreamError:
            return False
        answer.done()
        return bool((answer.usage or {}).get("completion_tokens"))
