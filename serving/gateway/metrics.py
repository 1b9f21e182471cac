"""The gateway's Prometheus metrics, in a registry of their own. Labels are bounded sets.

Names are part of the interface: dashboards and alerts match them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Every metric, made once per application: nothing is global."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ratchet_gateway_requests",
            "Chat requests by outcome. code is 'ok' or an error code.",
            ["code", "status", "stream"],
            registry=registry,
        )
        self.latency = Histogram(
            "ratchet_gateway_request_seconds",
            "From the request's arrival to its last byte.",
            ["stream"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.ttft = Histogram(
            "ratchet_gateway_time_to_first_token_seconds",
            "From the request's arrival to the engine's first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.retrieval = Histogram(
            "ratchet_gateway_retrieval_seconds",
            "Embedding and search, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "ratchet_gateway_tokens",
            "Tokens as the engine counted them.",
            ["kind"],
            registry=registry,
        )
        self.refusals = Counter(
            "ratchet_gateway_refusals",
            "Answers that say that the documents do not say.",
            ["by"],
            registry=registry,
        )
        self.unknown_citations = Counter(
            "ratchet_gateway_unknown_citations",
            "Cited numbers that no passage had.",
            registry=registry,
        )
        self.engine_errors = Counter(
            "ratchet_gateway_engine_errors",
            "Requests that the engine failed, by code.",
            ["code"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "ratchet_gateway_in_flight", "Chat requests being worked on.", registry=registry
        )
        self.retrieval_waiting = Gauge(
            "ratchet_gateway_retrieval_waiting",
            "Questions waiting for retrieval or in it.",
            registry=registry,
        )
        self.log_queue = Gauge(
            "ratchet_gateway_request_log_queue",
            "Records waiting for the request log.",
            registry=registry,
        )
        self.log_rows = Counter(
            "ratchet_gateway_request_log_rows",
            "Records written to the request log.",
            registry=registry,
        )
        self.log_dropped = Counter(
            "ratchet_gateway_request_log_dropped",
            "Records lost because the queue was full or the disk refused them.",
            registry=registry,
        )
        self.ready = Gauge(
            "ratchet_gateway_ready", "1 when the channel's engine gives tokens.", registry=registry
        )
        self.release = Gauge(
            "ratchet_gateway_release_info",
            "1 for what is being served.",
            ["channel", "release", "model", "prompt"],
            registry=registry,
        )
        for by in ("gateway", "model"):
            self.refusals.labels(by)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def serving(self, channel: str, release: str, model: str, prompt: str) -> None:
        """Say what is served now; what was served before is dropped."""
        self.release.clear()
        self.release.labels(channel, release, model, prompt).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
