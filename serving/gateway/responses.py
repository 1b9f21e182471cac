"""Small whole responses: JSON, and errors in the envelope with an id to quote."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from resources.requests import new_response_id
from serving.gateway.envelope import ApiError


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(data, status, {"content-type": "application/json", **(headers or {})})


def error_response(error: ApiError) -> Response:
    request_id = new_response_id(datetime.now(UTC))
    headers = {**error.all_headers(), "x-request-id": request_id}
    return json_response(error.envelope(request_id), error.status, headers)
