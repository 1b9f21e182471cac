"""Spans of a request: SERVER for the request itself, a gen_ai CLIENT for each attempt upstream.

Nothing of OpenTelemetry runs in the request's path: a ``Trace`` notes ids and times, and at the end
``Tracer.finish`` puts dictionaries of attributes into the exporter's queue, for sampled requests
only (9 us with one attempt). The exporter's thread makes spans of them, with the times noted here.
What is known of the whole request (tokens, text, finish reasons) stands on its last attempt.

The decision to sample is made at the head: a caller's own decision counts, else the trace id
decides, so that every gateway decides alike. Ids of keys and tenants stand on the SERVER span,
which only those see who may read the request log; nothing that people wrote stands anywhere, unless
``telemetry.content`` is on, and then it is masked.
"""

from __future__ import annotations

import time
from random import getrandbits
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from serving.gateway.api_request import PATHS, ApiRequest
from serving.gateway.telemetry import context
from serving.gateway.telemetry.config import Telemetry
from serving.gateway.telemetry.names import OPERATIONS, names
from serving.gateway.upstream_errors import CODES, Outcome

if TYPE_CHECKING:  # an exchange has a trace
    from collections.abc import Iterable

    from serving.gateway.endpoint import Endpoint
    from serving.gateway.exchange import Exchange

_LOW = (1 << 64) - 1


class SpanData(NamedTuple):
    """What an exporter makes a span of. Times are Unix nanoseconds."""

    name: str
    server: bool
    trace_id: int
    span_id: int
    parent_id: int  # 0: none
    remote: bool  # whether the parent is another process's
    start: int
    end: int
    attributes: dict[str, Any]
    failed: bool


class Sink(Protocol):
    def offer(self, item: tuple[SpanData, ...]) -> bool: ...


class Attempt:
    """One call of one upstream. Times are readings of ``perf_counter``."""

    __slots__ = ("asked_at", "ended_at", "endpoint", "outcome", "span_id")

    def __init__(self, span_id: int, endpoint: Endpoint, asked_at: float) -> None:
        self.span_id, self.endpoint, self.asked_at = span_id, endpoint, asked_at
        self.ended_at = 0.0  # 0: with the request
        self.outcome: Outcome = "cancelled"


class Trace:
    """One request's ids and times. Made by ``Tracer.begin``; without arguments, of nobody."""

    __slots__ = (
        "_began",
        "_exports",
        "_parent",
        "answered_at",
        "asked_at",
        "attempts",
        "attributes",
        "calls",
        "endpoint",
        "finish_reasons",
        "sampled",
        "span_id",
        "started",
        "trace_id",
    )

    def __init__(
        self, parent: context.Parent | None = None, threshold: int = 0, exports: bool = False
    ) -> None:
        self.started = time.perf_counter()
        self._began = time.time_ns() if exports else 0
        self._parent, self._exports = parent, exports
        self.trace_id = parent.trace_id if parent else (getrandbits(128) if exports else 0) or 1
        self.sampled = exports and (
            parent.sampled if parent else (self.trace_id & _LOW) < threshold
        )
        self.span_id = (getrandbits(64) or 1) if exports else 0
        self.asked_at = self.answered_at = 0.0  # perf_counter; 0: not yet
        self.attempts = 0
        self.calls: list[Attempt] = []  # of a sampled request
        self.endpoint = ("", "")  # provider and model that were asked last
        self.finish_reasons: list[str] = []
        self.attributes: dict[str, Any] = {}

    def call(self, endpoint: Endpoint) -> dict[str, str]:
        """An upstream is asked now. Returns the headers for it: our context, with a span id of this
        attempt, when we make spans, else the caller's as it came."""
        now = time.perf_counter()
        self.asked_at = self.asked_at or now
        self.answered_at = 0.0
        self.attempts += 1
        self.endpoint = (endpoint.provider, endpoint.model)
        parent = self._parent
        if not self._exports:
            return context.outgoing(*parent) if parent else {}
        span_id = getrandbits(64) or 1
        if self.sampled:
            self.calls.append(Attempt(span_id, endpoint, now))
        state = parent.state if parent else ""
        return context.outgoing(self.trace_id, span_id, self.sampled, state)

    def ended(self, outcome: Outcome) -> None:
        """The attempt failed, or the last byte of its answer is here. Without this, it ends with
        the request."""
        self.answered_at = time.perf_counter()
        if self.calls:
            self.calls[-1].ended_at, self.calls[-1].outcome = self.answered_at, outcome

    def asked(self, request: ApiRequest) -> None:
        """Note what was asked for; only numbers and names of the API are kept."""
        if not self.sampled:
            return
        for name in ("temperature", "top_p", "seed"):
            value = request.body.get(name)
            if isinstance(value, int | float):
                self.attributes[name] = value
        if request.max_tokens is not None:
            self.attributes["max_tokens"] = request.max_tokens
        if request.n != 1:
            self.attributes["choices"] = request.n
        if request.body.get("response_format"):
            self.attributes["output_type"] = "json"

    def at(self, moment: float) -> int:
        """Unix nanoseconds of a reading of ``perf_counter``: one clock for all times of a trace,
        so that a call never ends after its request."""
        return self._began + round((moment - self.started) * 1e9)

    def upstream_seconds(self) -> float:
        """Between asking the first upstream and the last byte; 0 when none was asked."""
        if not self.asked_at:
            return 0.0
        return (self.answered_at or time.perf_counter()) - self.asked_at


class Tracer:
    """Makes traces and turns ended requests into span data.

    Args:
        config: the telemetry block; may be replaced.
        sink: where spans go; None when nobody wants them.
    """

    def __init__(self, config: Telemetry, sink: Sink | None) -> None:
        self._sink, self._names = sink, names()
        self.configure(config)

    def configure(self, config: Telemetry) -> None:
        self.config = config
        self._threshold = round(config.sample_ratio * (1 << 64))

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> Trace:
        """A request has arrived with these ASGI headers."""
        return Trace(context.parent(headers), self._threshold, self._sink is not None)

    def finish(self, trace: Trace, exchange: Exchange) -> None:
        """The request has ended; its record is complete."""
        if not trace.sampled or self._sink is None:
            return
        end = trace.at(time.perf_counter())
        spans = [self._server(trace, exchange, end)]
        for number, call in enumerate(trace.calls, start=1):
            spans.append(self._call(trace, call, number, exchange, end))
        self._sink.offer(tuple(spans))

    def _server(self, trace: Trace, exchange: Exchange, end: int) -> SpanData:
        name, error = self._names, exchange.error
        path = PATHS[exchange.kind]
        found: dict[str, Any] = {
            name["method"]: "POST",
            name["route"]: path,
            name["path"]: path,
            name["scheme"]: "http",
            name["status"]: error.status if error else 200,
            "ratchet.response_id": exchange.response_id,
            "ratchet.model": exchange.model,
            "ratchet.cost": exchange.cost,
        }
        if error is not None:
            found[name["error_type"]] = error.code
        principal = exchange.principal
        if principal is not None:
            found["ratchet.tenant"], found["ratchet.key_id"] = principal.tenant, principal.key_id
        for key, value in (
            ("ratchet.channel", exchange.channel),
            ("ratchet.release", exchange.release),
            ("ratchet.cached", exchange.cached),
            ("ratchet.refused_by", exchange.refused_by),
        ):
            if value:
                found[key] = value
        if trace.attempts:
            found["ratchet.attempts"] = trace.attempts
        if exchange.guard != "allow":
            found["ratchet.guard"] = exchange.guard
        if exchange.retrieval_ms is not None:
            found["ratchet.retrieval_seconds"] = exchange.retrieval_ms / 1000
        parent = trace._parent
        return SpanData(
            f"POST {path}", True, trace.trace_id, trace.span_id, parent.span_id if parent else 0,
            parent is not None, trace._began, end, found,
            error is not None and error.status >= 500,
        )  # fmt: skip

    def _call(
        self, trace: Trace, call: Attempt, number: int, exchange: Exchange, end: int
    ) -> SpanData:
        name, endpoint = self._names, call.endpoint
        url = next(iter(endpoint.urls.values()))
        operation = OPERATIONS[exchange.kind]
        found: dict[str, Any] = {
            name["operation"]: operation,
            name["provider"]: endpoint.provider,
            name["request_model"]: endpoint.model,
            name["stream"]: exchange.stream,
            name["server_address"]: url.host or "",
            "ratchet.attempt": number,
            "ratchet.outcome": call.outcome,
        }
        if url.port is not None:
            found[name["server_port"]] = url.port
        code = CODES.get(call.outcome)
        if code is not None:
            found[name["error_type"]] = code
        if call is trace.calls[-1]:
            self._whole(trace, call, exchange, found)
        return SpanData(
            f"{operation} {endpoint.model}", False, trace.trace_id, call.span_id, trace.span_id,
            False, trace.at(call.asked_at), trace.at(call.ended_at) if call.ended_at else end,
            found, code is not None,
        )  # fmt: skip

    def _whole(
        self, trace: Trace, call: Attempt, exchange: Exchange, found: dict[str, Any]
    ) -> None:
        """What is known of the request, for its last attempt."""
        name = self._names
        for key, value in (
            ("input_tokens", exchange.prompt_tokens),
            ("output_tokens", exchange.completion_tokens),
        ):
            if value is not None:
                found[name[key]] = value
        for key, value in trace.attributes.items():
            found[name[key]] = value
        if exchange.tier:
            found["ratchet.tier"] = exchange.tier
        if exchange.tokens_estimated:
            found["ratchet.tokens_estimated"] = True
        if trace.finish_reasons:
            found[name["finish_reasons"]] = tuple(trace.finish_reasons)
        if exchange.live is not None:
            prompt, _, version = exchange.prompt_version.partition("/")
            found[name["prompt_name"]], found[name["prompt_version"]] = prompt, version
        if exchange.ttft_ms is not None:
            first = exchange.ttft_ms / 1000 - (call.asked_at - trace.started)
            found[name["first_chunk"]] = max(0.0, first)
        if self.config.content:
            found[name["input_messages"]] = _message("user", exchange.question)
            found[name["output_messages"]] = _message("assistant", exchange.text)


def _message(role: str, text: str) -> list[dict[str, Any]]:
    """As the conventions write a message; the exporter masks the text and makes JSON of it."""
    return [{"role": role, "parts": [{"type": "text", "content": text}]}]
