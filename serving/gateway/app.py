"""The gateway as one Starlette application, made of the parts handed to it. Pure ASGI throughout.

``create_app(settings)`` builds the real parts; tests hand in others. Routes: chat completions,
models, /healthz (the process lives), /readyz (tokens flow), /metrics. There is no middleware:
what later goes into the path of a request (keys, budgets, cache, guards, routing) belongs into
``chat.Chat``'s constructor as a part of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.settings import Settings
from serving.gateway.chat import Chat, Limits
from serving.gateway.engine import Deadlines, EngineClient
from serving.gateway.envelope import ApiError
from serving.gateway.health import Health
from serving.gateway.live import LiveRelease, Opener, opener
from serving.gateway.metrics import CONTENT_TYPE, Metrics
from serving.gateway.models import Models
from serving.gateway.request_log import RequestLog
from serving.gateway.responses import error_response, json_response
from serving.gateway.retrieval import Retriever

CHANNEL = "stable"


class Gateway:
    """All parts of one gateway, made and ended together."""

    def __init__(
        self,
        settings: Settings,
        *,
        channel: str = CHANNEL,
        open_live: Opener | None = None,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
        health_every: float = 2.0,
    ) -> None:
        self.metrics = Metrics()
        self.live = LiveRelease(settings, channel, open_live or opener(settings), self.metrics)
        self.engine = EngineClient(deadlines or Deadlines())
        self.retriever = Retriever(self.metrics)
        self.request_log = RequestLog(settings.requests_dir, self.metrics)
        self.health = Health(self.live, self.engine, self.metrics, health_every)
        self.models = Models(self.live)
        self.chat = Chat(
            self.live,
            self.engine,
            self.retriever,
            self.request_log,
            self.metrics,
            limits or Limits(),
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start the tasks; at the end let the request log write what waits."""
        self.request_log.start()
        async with self.engine:
            tasks = [
                asyncio.create_task(self.live.watch(), name="watch-channel"),
                asyncio.create_task(self.health.watch(), name="watch-engine"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.retriever.close()
                self.live.close()
                await asyncio.to_thread(self.request_log.close)

    async def healthz(self, request: Request) -> Response:
        """The process answers; nothing more is meant."""
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """200 when a question would be answered, 503 and the reason otherwise."""
        live, problem = self.live.current, self.health.problem
        body: dict[str, Any] = {
            "ready": problem is None,
            "channel": self.live.channel,
            "release": live.release if live else None,
            "model": live.channel.model if live else None,
            "prompt": live.prompt_version if live else None,
            "problem": problem,
            "switching": self.live.problem if live else None,
        }
        return json_response(body, 200 if problem is None else 503)

    async def scrape(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


def create_app(gateway: Gateway) -> Starlette:
    """The application of a gateway."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
            Route("/v1/models", gateway.models.index),
            Route("/v1/models/{name}", gateway.models.one),
            Route("/healthz", gateway.healthz),
            Route("/readyz", gateway.readyz),
            Route("/metrics", gateway.scrape),
        ],
        lifespan=gateway.lifespan,
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )
    app.router.redirect_slashes = False  # a redirect would be built from the client's Host header
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Routing errors in the envelope; there are no others of this kind."""
    status = getattr(error, "status_code", 500)
    path = request.scope["path"][:200]
    if status == 405:
        problem = ApiError("method_not_allowed", f"{request.method} is not for {path}.")
        problem.headers = dict(getattr(error, "headers", None) or {})
    else:
        problem = ApiError("not_found", f"There is nothing at {path}.")
    return error_response(problem)


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError("internal_error", "The gateway failed; its log says why."))
