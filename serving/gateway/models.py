"""``GET /v1/models``: the names a client may use. Engines' own names are not among them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from resources.releases import MARKER
from serving.gateway.chat import ALIAS
from serving.gateway.envelope import ApiError
from serving.gateway.live import LiveRelease
from serving.gateway.responses import error_response, json_response


class Models:
    """The channel and its alias, with the release behind them."""

    def __init__(self, live: LiveRelease) -> None:
        self._live = live

    async def index(self, request: Request) -> Response:
        return json_response({"object": "list", "data": self._all()})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        for model in self._all():
            if model["id"] == name:
                return json_response(model)
        return error_response(
            ApiError("model_not_found", f"There is no model '{name[:64]}'.", "model")
        )

    def _all(self) -> list[dict[str, Any]]:
        """Empty while nothing is served."""
        live = self._live.current
        if live is None:
            return []
        created = int((live.installed.path / MARKER).stat().st_mtime)
        return [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "ratchet",
                "release": live.release,
            }
            for name in (self._live.channel, ALIAS)
        ]
