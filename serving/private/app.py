"""The private side of the gateway as an ASGI application: approvals.

Whoever reaches the port may read; an answer needs the request's token. Pages load nothing from
elsewhere and may not be framed, and a form of another site cannot post here, because it has no
token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import closing
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from contracts.errors import ConflictError, InputError, NotFoundError, RatchetError
from contracts.settings import Settings
from resources import approvals, releases
from resources.ledger import Ledger
from resources.release_card.evidence import Evidence
from serving.private import pages

#: Bytes of a posted form; its fields have at most 2,400 characters.
FORM_BYTES = 20_000


def create_app(settings: Settings) -> Starlette:
    """The application. Every request opens the ledger anew: nothing is kept between them."""

    def index(request: Request) -> Response:
        with closing(Ledger.open(settings)) as ledger:
            return _page(pages.index(approvals.requests(ledger)))

    def show(request: Request) -> Response:
        nonce = secrets.token_urlsafe(12)
        with closing(Ledger.open(settings)) as ledger:
            found = approvals.find(ledger, request.path_params["seq"])
            return _page(pages.detail(found, settings, nonce), nonce=nonce)

    def gate(request: Request) -> Response:
        with closing(Ledger.open(settings)) as ledger:
            found = approvals.find(ledger, request.path_params["seq"])
        release = releases.load(settings, found.entry.release).release
        file = Evidence(release, settings).file("gate", "report.html")
        if file is None:
            raise NotFoundError(
                "The gate's report is not here.", next="dvc pull at the release's commit"
            )
        return _page(file.read_text(encoding="utf-8"))

    def answer(seq: int, form: dict[str, str]) -> Response:
        if form.get("decision") not in ("approve", "refuse"):
            raise InputError("The form says neither approve nor refuse.")
        with closing(Ledger.open(settings)) as ledger:
            approvals.answer(
                settings,
                ledger,
                seq,
                token=form.get("token", ""),
                approve=form["decision"] == "approve",
                name=form.get("name", ""),
                reason=form.get("reason", ""),
            )
        return RedirectResponse(f"/approvals/{seq}", status_code=303)

    async def post(request: Request) -> Response:
        """Read a bounded form; answer in a thread, because the ledger may wait for its lock."""
        seq: int = request.path_params["seq"]
        try:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > FORM_BYTES:
                    raise InputError("The form is too long.")
            fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
            form = {name: values[-1] for name, values in fields.items()}
            return await run_in_threadpool(answer, seq, form)
        except RatchetError as error:
            return _page(pages.problem(error, seq), _status(error))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/", lambda request: RedirectResponse("/approvals")),
            Route("/approvals", _guarded(index)),
            Route("/approvals/{seq:int}", _guarded(show), methods=["GET"]),
            Route("/approvals/{seq:int}", post, methods=["POST"]),
            Route("/approvals/{seq:int}/gate", _guarded(gate)),
            Route("/healthz", health),
        ],
        # A name that somebody else points at this address may not read the pages.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_hosts(settings))],
    )


def _guarded(work: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """``work`` in Starlette's thread pool, with errors as pages."""

    def run(request: Request) -> Response:
        try:
            return work(request)
        except RatchetError as error:
            return _page(pages.problem(error, None), _status(error))

    return run


def _hosts(settings: Settings) -> list[str]:
    return ["127.0.0.1", "localhost", "[::1]", settings.private_host]


def _status(error: RatchetError) -> int:
    for kind, status in ((NotFoundError, 404), (ConflictError, 409), (InputError, 400)):
        if isinstance(error, kind):
            return status
    return 500


def _page(text: str, status: int = 200, nonce: str = "") -> Response:
    script = f"; script-src 'nonce-{nonce}'" if nonce else ""
    return HTMLResponse(
        text,
        status_code=status,
        headers={
            "Content-Security-Policy": "default-src 'none'; img-src data:; form-action 'self'; "
            f"frame-ancestors 'none'; style-src 'unsafe-inline'{script}",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )
