"""Every name of OpenTelemetry's gen_ai conventions that the gateway uses, in one table.

The conventions are in development: their metrics and some attributes are being renamed. The default
is what is deployed (the registry that opentelemetry-semantic-conventions 0.66b2 holds); with
``OTEL_SEMCONV_STABILITY_OPT_IN=gen_ai_latest_experimental`` it is the registry of October 2026.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

OPT_IN = "OTEL_SEMCONV_STABILITY_OPT_IN"
LATEST = "gen_ai_latest_experimental"

#: What we call it -> (deployed, latest).
_TABLE: dict[str, tuple[str, str]] = {
    **{
        name: (f"gen_ai.{key}", f"gen_ai.{key}")
        for name, key in {
            "operation": "operation.name",
            "provider": "provider.name",
            "request_model": "request.model",
            "stream": "request.stream",
            "choices": "request.choice.count",
            "max_tokens": "request.max_tokens",
            "temperature": "request.temperature",
            "top_p": "request.top_p",
            "seed": "request.seed",
            "output_type": "output.type",
            "prompt_name": "prompt.name",
            "finish_reasons": "response.finish_reasons",
            "first_chunk": "response.time_to_first_chunk",
            "input_tokens": "usage.input_tokens",
            "output_tokens": "usage.output_tokens",
            "input_messages": "input.messages",
            "output_messages": "output.messages",
            "token_type": "token.type",
        }.items()
    },
    # Newer than the deployed registry, and nothing else says it.
    "prompt_version": ("gen_ai.prompt.version", "gen_ai.prompt.version"),
    "duration": ("gen_ai.client.operation.duration", "gen_ai.client.inference.duration"),
    "metric_first_chunk": (
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.client.inference.time_to_first_chunk",
    ),
    "metric_per_chunk": (
        "gen_ai.client.operation.time_per_output_chunk",
        "gen_ai.client.inference.time_per_output_chunk",
    ),
    # One histogram by token type, or one for each direction.
    "metric_input_tokens": (
        "gen_ai.client.token.usage",
        "gen_ai.client.inference.operation.input_tokens",
    ),
    "metric_output_tokens": (
        "gen_ai.client.token.usage",
        "gen_ai.client.inference.operation.output_tokens",
    ),
    # Of other conventions, stable.
    "error_type": ("error.type", "error.type"),
    "server_address": ("server.address", "server.address"),
    "server_port": ("server.port", "server.port"),
    "method": ("http.request.method", "http.request.method"),
    "route": ("http.route", "http.route"),
    "path": ("url.path", "url.path"),
    "scheme": ("url.scheme", "url.scheme"),
    "status": ("http.response.status_code", "http.response.status_code"),
}

#: Our kind of request -> gen_ai.operation.name.
OPERATIONS = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}


def names(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The names in force, by what we call them."""
    latest = LATEST in environ.get(OPT_IN, "").replace(" ", "").split(",")
    return {name: pair[latest] for name, pair in _TABLE.items()}


def prometheus(name: str) -> str:
    """A metric's name as Prometheus writes it, without the unit and without ``_total``."""
    return name.replace(".", "_")
