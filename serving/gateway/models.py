"""``GET /v1/models``: the names that this client may use. Engines' own names are not among them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from resources.releases import MARKER
from serving.gateway.auth import Principal
from serving.gateway.envelope import ApiError
from serving.gateway.release import ALIAS
from serving.gateway.responses import error_response, json_response
from serving.gateway.services import Services


class Models:
    """The channel and its alias, with the release behind them, and the plain models."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def index(self, request: Request) -> Response:
        try:
            principal = self._services.authenticator.authenticate(request.scope["headers"])
        except ApiError as error:
            return error_response(error)
        return json_response({"object": "list", "data": self._all(principal)})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            principal = self._services.authenticator.authenticate(request.scope["headers"])
        except ApiError as error:
            return error_response(error)
        for model in self._all(principal):
            if model["id"] == name:
                return json_response(model)
        return error_response(
            ApiError("model_not_found", f"There is no model '{name[:64]}'.", "model")
        )

    def _all(self, principal: Principal) -> list[dict[str, Any]]:
        """No release while none is served."""
        found = [
            {"id": name, "object": "model", "created": 0, "owned_by": "ratchet"}
            for name in sorted(self._services.router.routes)
        ]
        live = self._services.live.current
        if live is not None and principal.key.allows_release(live.channel.name, live.release):
            created = int((live.installed.path / MARKER).stat().st_mtime)
            found = [
                {
                    "id": name,
                    "object": "model",
                    "created": created,
                    "owned_by": "ratchet",
                    "release": live.release,
                }
                for name in (self._services.live.channel, ALIAS)
            ] + found
        return [model for model in found if principal.key.allows_model(str(model["id"]))]
