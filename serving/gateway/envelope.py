"""Errors as OpenAI clients expect them: one envelope, stable codes, our request id.

``{"error": {"message", "type", "param", "code", "request_id"}}`` as a body before the first byte,
as one ``data:`` frame after it. Codes are part of the interface: dashboards and clients match them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

#: Every code that can leave the gateway, with its HTTP status and OpenAI error type.
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "invalid_request_error"),
    "invalid_request": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "engine_refused_request": (400, "invalid_request_error"),
    "content_blocked": (400, "invalid_request_error"),  # a guard refused what came in
    "invalid_api_key": (
        401,
        "authentication_error",
    ),  # unknown, wrong, revoked, expired: one answer
    "model_not_found": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "budget_exceeded": (429, "insufficient_quota"),
    "client_disconnected": (499, "client_error"),  # only in log and metrics: nobody reads it
    "internal_error": (500, "server_error"),
    "output_blocked": (502, "server_error"),  # a guard refused what the model said
    "engine_unreachable": (502, "server_error"),
    "engine_error": (502, "server_error"),
    "engine_disconnected": (502, "server_error"),
    "engine_malformed_stream": (502, "server_error"),
    "not_ready": (503, "server_error"),
    "overloaded": (503, "server_error"),
    "keys_unavailable": (503, "server_error"),
    "limits_unavailable": (503, "server_error"),
    "guard_unavailable": (503, "server_error"),
    "engine_overloaded": (503, "server_error"),
    "engine_timeout": (504, "server_error"),
}
#: Saturation passes: say when to come again. vLLM's own 503 does not.
RETRY_AFTER = {"not_ready": "2", "overloaded": "1", "engine_overloaded": "1"}


@dataclass
class ApiError(Exception):
    """An error that a client is told. ``code`` is a key of CODES."""

    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return CODES[self.code][0]

    def envelope(self, request_id: str) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": CODES[self.code][1],
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }

    def body(self, request_id: str) -> bytes:
        return json.dumps(self.envelope(request_id)).encode()

    def frame(self, request_id: str) -> bytes:
        """The error inside a stream that has already begun."""
        return b"data: " + self.body(request_id) + b"\n\n"

    def all_headers(self) -> dict[str, str]:
        retry = {"retry-after": RETRY_AFTER[self.code]} if self.code in RETRY_AFTER else {}
        return {**retry, **self.headers}
