"""Every metric of one ended request. On the hot path, and from the event loop only.

All label values are bounded: codes, models and providers by code and configuration, features and
tenants by ``Bounded``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from serving.gateway.metrics import Metrics
from serving.gateway.telemetry.config import Telemetry
from serving.gateway.telemetry.names import OPERATIONS, names, prometheus
from serving.gateway.telemetry.tally import LoopHistogram

if TYPE_CHECKING:
    from serving.gateway.exchange import Exchange
    from serving.gateway.telemetry.spans import Trace

OTHER = "other"
#: As resources.keys.records.Slug.
FEATURE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
#: As the conventions advise.
_DURATIONS = tuple(0.01 * 2**power for power in range(14))
_CHUNKS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


class Bounded:
    """Label values as they are, up to ``limit`` distinct ones; later ones, and what is no name, are
    OTHER. "" stays "". First come, first kept: a label that appears and goes again would break the
    counter that it names."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = {""}

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) > self._limit or not FEATURE.fullmatch(value):
            return OTHER
        self._known.add(value)
        return value


class GenAi:
    """The gen_ai client metrics, under OpenTelemetry's names as Prometheus writes them. By
    operation, provider and model; never by key, user or tenant."""

    def __init__(self, metrics: Metrics) -> None:
        self._names = name = names()
        base = [prometheus(name[key]) for key in ("operation", "provider", "request_model")]
        error = prometheus(name["error_type"])

        def histogram(
            key: str, what: str, labels: list[str], buckets: Any, unit: str
        ) -> LoopHistogram:
            found = prometheus(name[key]) + unit
            return LoopHistogram(found, what, labels, buckets=buckets, registry=metrics.registry)

        self.duration = histogram(
            "duration", "Duration of the call upstream.", [*base, error], _DURATIONS, "_seconds"
        )
        self.first = histogram(
            "metric_first_chunk", "From asking to the first chunk.", base, _CHUNKS, "_seconds"
        )
        self.per_chunk = histogram(
            "metric_per_chunk",
            "Mean time between chunks, one observation a stream.",
            base,
            _CHUNKS,
            "_seconds",
        )
        if name["metric_input_tokens"] == name["metric_output_tokens"]:
            both = histogram(
                "metric_input_tokens",
                "Tokens of a call.",
                [*base, prometheus(name["token_type"])],
                _TOKENS,
                "",
            )
            self._tokens = (both, both)
        else:
            self._tokens = (
                histogram("metric_input_tokens", "Tokens of a prompt.", base, _TOKENS, ""),
                histogram("metric_output_tokens", "Tokens of an answer.", base, _TOKENS, ""),
            )

    def tokens(self, base: tuple[str, str, str], prompt: int, completion: int) -> None:
        into, out = self._tokens
        if into is out:
            into.labels(*base, "input").observe(prompt)
            out.labels(*base, "output").observe(completion)
        else:
            into.labels(*base).observe(prompt)
            out.labels(*base).observe(completion)


class Recorder:
    """Counts ended requests.

    Args:
        metrics: of the gateway.
        config: the bounds of label sets. They hold as long as the process: counters cannot forget.
    """

    def __init__(self, metrics: Metrics, config: Telemetry) -> None:
        self._metrics = metrics
        self.features, self.tenants = Bounded(config.features), Bounded(config.tenants)
        self._requests, self._latency = metrics.requests.labels, metrics.latency.labels
        self._engine_errors = metrics.engine_errors.labels
        self._model_tokens, self._cost = metrics.model_tokens.labels, metrics.cost.labels
        self._tenant_cost = metrics.tenant_cost.labels
        self._prompt = metrics.tokens.labels("prompt")
        self._completion = metrics.tokens.labels("completion")
        self._gen_ai = GenAi(metrics)

    def count(self, exchange: Exchange, trace: Trace, seconds: float) -> None:
        """One request has ended. What only releases have, the exchange counts itself.

        Args:
            seconds: from its arrival to its last byte.
        """
        metrics, error = self._metrics, exchange.error
        code, status = (error.code, str(error.status)) if error else ("ok", "200")
        stream = "true" if exchange.stream else "false"
        self._requests(code, status, stream).inc()
        self._latency(stream).observe(seconds)
        if code.startswith("engine_"):
            self._engine_errors(code).inc()
        prompt, completion = exchange.prompt_tokens or 0, exchange.completion_tokens or 0
        if trace.asked_at or exchange.cached:
            model = exchange.model
            if prompt:
                self._prompt.inc(prompt)
                self._model_tokens(model, "prompt").inc(prompt)
            if completion:
                self._completion.inc(completion)
                self._model_tokens(model, "completion").inc(completion)
        if exchange.cost:
            feature = self.features(exchange.feature)
            self._cost(exchange.model, feature).inc(exchange.cost)
            if exchange.principal is not None:
                tenant = self.tenants(exchange.principal.tenant)
                self._tenant_cost(tenant).inc(exchange.cost)
        first = None if exchange.ttft_ms is None else exchange.ttft_ms / 1000
        if first is not None:
            metrics.ttft.observe(first)
        if trace.asked_at:
            self._call(exchange, trace, seconds, first, code, (prompt, completion))

    def _call(
        self,
        exchange: Exchange,
        trace: Trace,
        seconds: float,
        first: float | None,
        code: str,
        tokens: tuple[int, int],
    ) -> None:
        """A request for which an upstream was asked."""
        upstream = trace.upstream_seconds()
        self._metrics.overhead.observe(max(0.0, seconds - upstream))
        live = exchange.live
        base = (
            OPERATIONS[exchange.kind],
            trace.endpoint[0] or exchange.provider or "unknown",
            trace.endpoint[1] or (live.channel.model if live else exchange.model),
        )
        failed = code if code.startswith("engine_") else ""
        self._gen_ai.duration.labels(*base, failed).observe(upstream)
        if not failed:
            self._gen_ai.tokens(base, *tokens)
        if exchange.stream and first is not None:
            before = trace.asked_at - trace.started
            self._gen_ai.first.labels(*base).observe(max(0.0, first - before))
            if tokens[1] > 1 and code == "ok":
                each = max(0.0, seconds - first) / (tokens[1] - 1)
                self._metrics.tpot.observe(each)
                self._gen_ai.per_chunk.labels(*base).observe(each)
