"""The path of a request, from its first header to its record; docs/decisions/0009 has the table.

A plain ASGI application for one kind of request. Everything that the two kinds of models share
stands here; ``release.py`` and ``plain.py`` are the answers of each.
"""

from __future__ import annotations

import asyncio
import logging
import traceback

from starlette.types import Receive, Scope, Send

from serving.gateway import plain, release
from serving.gateway.api_request import Kind
from serving.gateway.body import Disconnected, WhileConnected, read_body
from serving.gateway.chat_request import model_name
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.reply import Reply
from serving.gateway.services import Services
from serving.gateway.strict_json import read_object

log = logging.getLogger("ratchet.gateway.handler")
#: Characters of a session's or feature's name; longer ones are refused, not cut.
MAX_NAME = 128


class Handler:
    """One endpoint.

    Args:
        kind: what is asked here.
        services: the parts.
    """

    def __init__(self, kind: Kind, services: Services) -> None:
        self.kind, self.services = kind, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self.services
        exchange = Exchange("", self.kind, trace=services.recording.begin(scope["headers"]))
        reply = Reply(exchange, scope, send, services.now.config.requests.write_seconds)
        services.in_flight += 1
        try:
            await self._told(scope, receive, exchange, reply)
        finally:
            services.in_flight -= 1
            services.recording.ended(exchange)

    async def _told(self, scope: Scope, receive: Receive, exchange: Exchange, reply: Reply) -> None:
        """Work until done or the client is gone; every failure ends in one error, told once."""
        try:
            await self._work(scope, receive, exchange, reply)
        except Disconnected:
            exchange.error = ApiError("client_disconnected", "The client left.")
        except ApiError as error:
            exchange.error = error
            await reply.error(error)
        except asyncio.CancelledError:
            exchange.error = ApiError("client_disconnected", "The gateway was shut down.")
            raise
        except Exception as error:
            # People's words may stand in the exception's message: its type and place must do.
            place = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", exchange.response_id, type(error).__name__, place)
            exchange.error = ApiError("internal_error", "The gateway failed; its log says why.")
            await reply.error(exchange.error)

    async def _work(self, scope: Scope, receive: Receive, exchange: Exchange, reply: Reply) -> None:
        services = self.services
        allowed = services.now.config.requests
        exchange.principal = principal = services.authenticator.authenticate(scope["headers"])
        if services.in_flight > allowed.in_flight:
            raise ApiError("overloaded", "Too many requests are in flight.")
        _headers(scope, exchange)
        raw = await read_body(scope, receive, allowed.body_bytes, allowed.body_seconds)
        async with WhileConnected(scope, receive, reply.is_over):
            given = read_object(raw)
            exchange.model = name = model_name(given)
            may = principal.key.allows_model(name)
            if may and self.kind == "chat" and name in (release.ALIAS, services.live.channel):
                await release.answer(services, services.live, given, exchange, reply)
            elif may and (route := services.router.routes.get(name)):
                await plain.answer(services, route, given, exchange, reply)
            else:
                exchange.model = ""  # a client's invention is no label
                raise ApiError("model_not_found", f"There is no model '{name[:64]}'.", "model")


def _headers(scope: Scope, exchange: Exchange) -> None:
    """Take what is ours out of the headers."""
    for name, value in scope["headers"]:
        if name in (b"x-session-id", b"x-ratchet-feature"):
            text = value.decode("latin-1")
            if len(text) > MAX_NAME or not text.isprintable():
                where = name.decode()
                raise ApiError("invalid_request", f"'{where}' must be short and printable.", where)
            if name == b"x-session-id":
                exchange.session = text
            else:
                exchange.feature = text
    if not exchange.feature and exchange.principal is not None:
        exchange.feature = exchange.principal.key.feature or ""
