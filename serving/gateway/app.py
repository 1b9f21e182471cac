"""The gateway as one ASGI application, made of the parts handed to it.

``Gateway(settings)`` builds the real parts; tests hand in others. The three endpoints that models
answer are reached before any router: a look-up by path. Models, /healthz (the process lives),
/readyz (tokens flow) and /metrics are plain Starlette routes. There is no middleware; what stands
in the path of a request stands in ``handler.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from contracts.errors import RatchetError
from contracts.settings import Settings
from resources import feedback
from resources.keys import KeyStore
from serving.gateway.api_request import PATHS
from serving.gateway.auth import Authenticator
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.config import GatewayConfig, load, refuse_exposed
from serving.gateway.envelope import ApiError
from serving.gateway.feedback import FeedbackEndpoint
from serving.gateway.guards.run import Guards
from serving.gateway.handler import Handler
from serving.gateway.health import Health
from serving.gateway.limits import open_limiter
from serving.gateway.limits.tokens import Tokenizers
from serving.gateway.live import LiveRelease, Opener, opener
from serving.gateway.metrics import CONTENT_TYPE, Metrics
from serving.gateway.models import Models
from serving.gateway.openapi import document_bytes
from serving.gateway.prompt_choice import PromptChooser
from serving.gateway.recording import Recording
from serving.gateway.responses import error_response, json_response
from serving.gateway.retrieval import Retriever
from serving.gateway.routing.router import Router
from serving.gateway.services import Configured, Services, dearest, targets
from serving.gateway.shadow import Shadow
from serving.gateway.split import Trial
from serving.gateway.upstream import UpstreamClient

log = logging.getLogger("ratchet.gateway.app")
CHANNEL = "stable"
FEEDBACK = "/v1/feedback"
POSTED = (*PATHS.values(), FEEDBACK)
RELOAD_SECONDS = 1.0


class Gateway:
    """All parts of one gateway, made and ended together. Raises ConfigError.

    Args:
        settings: addresses and folders.
        channel: whose release is served.
        config: instead of the file that the settings name; it is then never reloaded.
        open_live, health_every: for tests.
        host: the address that it listens on.
        workers: processes that share the limits of this gateway.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        channel: str = CHANNEL,
        config: GatewayConfig | None = None,
        open_live: Opener | None = None,
        health_every: float = 2.0,
        host: str = "127.0.0.1",
        workers: int = 1,
    ) -> None:
        self.settings, self._host = settings, host
        self._fixed = config is not None
        self._seen = _signature(settings.gateway_config)
        config = config or load(settings)
        refuse_exposed(config, host, settings)
        self.metrics = metrics = Metrics()
        self.upstream = UpstreamClient()
        keys = KeyStore.open(settings)
        tokenizers = Tokenizers()
        recording = Recording(settings, config.telemetry, metrics, keys.pepper)
        self.services = Services(
            live=LiveRelease(settings, channel, open_live or opener(settings), metrics),
            router=Router(self.upstream, metrics, config.routing, salt=keys.pepper),
            retriever=Retriever(metrics),
            prompts=PromptChooser(keys.pepper, settings),
            authenticator=Authenticator(keys, config.auth, metrics),
            limiter=open_limiter(config.limits, settings, metrics, workers=workers),
            tokenizers=tokenizers,
            cache=ResponseCache(config.cache, settings, metrics),
            recording=recording,
            shadow=Shadow(
                self.upstream,
                metrics,
                config.routing,
                keys.pepper,
                recording.request_log.offer,
                settings,
            ),
            metrics=metrics,
            now=self._configured(config, tokenizers),
            salt=keys.pepper,
        )
        self.live = self.services.live
        self.live.let_go = self.services.router.forget
        self.health = Health(self.live, self.upstream, metrics, health_every)
        self.models = Models(self.services)
        self.feedback = FeedbackEndpoint(
            self.services.authenticator, feedback.folder(settings), settings.requests_dir, metrics
        )
        self.services.recording.noted = self.feedback.note
        metrics.in_flight.set_function(lambda: self.services.in_flight)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start the parts and tasks; at the end let the logs write what waits."""
        services = self.services
        services.recording.start()
        services.authenticator.start()
        await services.limiter.start()
        await services.cache.start()
        await services.now.guards.start()
        async with self.upstream:
            tasks = [
                asyncio.create_task(services.live.watch(), name="watch-channel"),
                asyncio.create_task(self.health.watch(), name="watch-engine"),
                asyncio.create_task(services.router.watch(), name="watch-queues"),
                asyncio.create_task(self._watch_config(), name="watch-config"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await services.shadow.close()
                services.retriever.close()
                services.prompts.close()
                services.live.close()
                services.tokenizers.close()
                await services.now.guards.close()
                await services.limiter.close()
                await services.cache.close()
                await asyncio.to_thread(services.authenticator.close)
                await services.recording.close()

    async def reload(self) -> bool:
        """Read the configuration again and swap it in whole; False, and everything as it was, when
        it cannot be used. Requests under way end with what they began with."""
        services, following = self.services, None
        try:
            config = await asyncio.to_thread(load, self.settings)
            refuse_exposed(config, self._host, self.settings)
            before = services.now
            following = await asyncio.to_thread(self._configured, config, services.tokenizers)
            await following.guards.start()
            services.router.configure(config.routing)  # refuses missing keys before it changes
        except (RatchetError, OSError) as error:
            self.metrics.reloads.labels("refused").inc()
            services.recording.audit.event("config_refused")
            log.error("the configuration was not taken: %s", error)
            if following is not None:
                await following.guards.close()
            return False
        services.shadow.configure(config.routing)
        services.limiter.configure(config.limits)
        services.recording.configure(config.telemetry)
        services.recording.audit.event("config_taken")
        services.cache.configure(config.cache)
        services.authenticator.config = config.auth
        services.now = following
        self.metrics.reloads.labels("taken").inc()
        log.info("the configuration was read again")
        # Streams that began under the old guards may still use them.
        asyncio.get_running_loop().call_later(
            RELOAD_SECONDS, lambda: asyncio.ensure_future(before.guards.close())
        )
        return True

    async def _watch_config(self) -> None:
        """Reload when the file has changed and then stood still from one look to the next: an
        editor may empty a file before it writes, and an empty one is a configuration; run as a
        task."""
        last = self._seen
        while not self._fixed:
            await asyncio.sleep(RELOAD_SECONDS)
            before, last = last, await asyncio.to_thread(_signature, self.settings.gateway_config)
            if last == before != self._seen:
                self._seen = last
                try:
                    await self.reload()
                except Exception:  # a bug here must not end the watching
                    log.exception("reading the configuration again failed")

    def _configured(self, config: GatewayConfig, tokenizers: Tokenizers) -> Configured:
        """May block for a second: tokenizers are opened."""
        return Configured(
            config,
            Guards(
                config.guards,
                self.metrics,
                lambda response_id, found: self.services.recording.audit.late(response_id, found),
            ),
            {
                model.name: tokenizers.open(_tokenizer(self.settings.root, model.candidates))
                for model in config.routing.models
            },
            dearest(config),
            targets(config),
        )

    async def healthz(self, request: Request) -> Response:
        """The process answers; nothing more is meant."""
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """200 when a question would be answered, 503 and the reason otherwise."""
        services, live = self.services, self.live.current
        problem = self.problem
        plan = services.prompts.plan(services.now.config.prompts, live) if live else None
        body: dict[str, Any] = {
            "ready": problem is None,
            "channel": self.live.channel,
            "release": live.release if live else None,
            "model": live.channel.model if live else None,
            "prompt": live.prompt_version if live else None,
            "prompt_experiment": plan.experiment or None if plan else None,
            "prompt_problem": plan.problem if plan else None,
            "models": sorted(services.router.routes),
            "problem": problem,
            "switching": self.live.problem if live else None,
            "candidate": _trial(self.live.trial),
        }
        return json_response(body, 200 if problem is None else 503)

    @property
    def problem(self) -> str | None:
        """Why no traffic should come, or None. A gateway of plain models needs no release."""
        services = self.services
        if services.draining():
            return "the gateway is shutting down"
        if (problem := services.authenticator.problem) is not None:
            return problem
        if services.router.routes and self.live.idle:
            return None
        return self.health.problem

    async def openapi(self, request: Request) -> Response:
        return Response(document_bytes(), headers={"content-type": "application/json"})

    async def scrape(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


class App:
    """Paths that models answer go to their handler, everything else to the router."""

    def __init__(self, gateway: Gateway, router: ASGIApp) -> None:
        self._router = router
        self._handlers: dict[str, ASGIApp] = {
            path: Handler(kind, gateway.services) for kind, path in PATHS.items()
        }
        self._handlers[FEEDBACK] = gateway.feedback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"])
            if handler is not None:
                # A proxy that lets paths through reads the path as it was sent.
                if b"%" in scope["raw_path"]:
                    error = ApiError("not_found", "This path may not be percent-encoded.")
                    await error_response(error)(scope, receive, send)
                else:
                    await handler(scope, receive, send)
                return
        await self._router(scope, receive, send)


def create_app(gateway: Gateway) -> ASGIApp:
    """The application of a gateway."""
    router = Starlette(
        routes=[
            *(
                Route(path, _not_posted, methods=["POST"])
                for path in (*PATHS.values(), "/v1/feedback")
            ),
            Route("/v1/models", gateway.models.index),
            Route("/v1/models/{name:path}", gateway.models.one),
            Route("/healthz", gateway.healthz),
            Route("/readyz", gateway.readyz),
            Route("/metrics", gateway.scrape),
            Route("/openapi.json", gateway.openapi),
        ],
        lifespan=gateway.lifespan,
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )
    router.router.redirect_slashes = False  # a redirect would be built from the client's Host
    return App(gateway, router)


async def _not_posted(request: Request) -> Response:
    """Only other methods come here, and the router answers them 405."""
    raise HTTPException(405)


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


def _tokenizer(root: Path, candidates: Any) -> Path | None:
    """The first candidate's tokenizer that is named; paths are relative to the checkout."""
    named = [candidate.tokenizer for candidate in candidates if candidate.tokenizer]
    return root / named[0] if named else None


def _trial(trial: Trial | None) -> dict[str, Any] | None:
    """What /readyz says of a rollout."""
    if trial is None:
        return None
    candidate = trial.candidate
    return {
        "release": candidate.release,
        "strategy": candidate.strategy,
        "share": candidate.share,
        "open": trial.live is not None,
    }


def _signature(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None
