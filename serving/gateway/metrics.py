"""The gateway's Prometheus metrics, in a registry of their own. Labels are bounded sets. Those of
tally.py are for the event loop alone, the others for every thread.

Names are part of the interface: dashboards and alerts match them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from contracts.records import Candidate
from serving.gateway.telemetry.tally import LoopCounter, LoopHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Every metric, made once per application: nothing is global."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = LoopCounter(
            "ratchet_gateway_requests",
            "Chat requests by outcome. code is 'ok' or an error code.",
            ["code", "status", "stream"],
            registry=registry,
        )
        self.latency = LoopHistogram(
            "ratchet_gateway_request_seconds",
            "From the request's arrival to its last byte.",
            ["stream"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.ttft = LoopHistogram(
            "ratchet_gateway_time_to_first_token_seconds",
            "From the request's arrival to the engine's first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_exposures = LoopCounter(
            "ratchet_gateway_prompt_exposures",
            "Answers that a model wrote, by the version of the release's prompt.",
            ["prompt_version"],
            registry=registry,
        )
        self.retrieval = Histogram(
            "ratchet_gateway_retrieval_seconds",
            "Embedding and search, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = LoopCounter(
            "ratchet_gateway_tokens",
            "Tokens as the engine counted them.",
            ["kind"],
            registry=registry,
        )
        self.refusals = LoopCounter(
            "ratchet_gateway_refusals",
            "Answers that say that the documents do not say.",
            ["by"],
            registry=registry,
        )
        self.unknown_citations = LoopCounter(
            "ratchet_gateway_unknown_citations",
            "Cited numbers that no passage had.",
            registry=registry,
        )
        self.engine_errors = LoopCounter(
            "ratchet_gateway_engine_errors",
            "Requests that the engine failed, by code.",
            ["code"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "ratchet_gateway_in_flight", "Chat requests being worked on.", registry=registry
        )
        self.tasks = Gauge(
            "ratchet_gateway_tasks", "Tasks of the event loop, idle ones too.", registry=registry
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
        self.candidate_share = Gauge(
            "ratchet_gateway_candidate_share",
            "Of the channel's traffic, for the candidate of a rollout; nothing without one.",
            ["channel", "release", "strategy"],
            registry=registry,
        )
        self.arms = LoopCounter(
            "ratchet_gateway_rollout_requests",
            "Requests of a channel with a candidate, by arm (stable, candidate) and outcome: ok, "
            "moved (the candidate failed and the stable release answered), or an error code.",
            ["arm", "outcome"],
            registry=registry,
        )
        self.shadowed = LoopCounter(
            "ratchet_gateway_shadow_requests",
            "Copies of requests for a candidate, by outcome; 'dropped' when too many were at work.",
            ["outcome"],
            registry=registry,
        )
        self.auth_refused = LoopCounter(
            "ratchet_gateway_auth_refused",
            "Requests refused because of their API key.",
            ["code"],
            registry=registry,
        )
        self.keys_age = Gauge(
            "ratchet_gateway_keys_age_seconds",
            "Since the keys in memory were last read from their store.",
            registry=registry,
        )
        self.keys_refresh_failures = Counter(
            "ratchet_gateway_keys_refresh_failures",
            "Reads of the keys that failed.",
            registry=registry,
        )
        self.limited = LoopCounter(
            "ratchet_gateway_limited",
            "Requests refused by a limit, by what it counts and whose it is.",
            ["limit", "scope"],
            registry=registry,
        )
        self.limits_outage = Counter(
            "ratchet_gateway_limits_outage",
            "Requests decided by limits.on_outage, because the store of the limits was down.",
            ["policy"],
            registry=registry,
        )
        self.leases = Gauge(
            "ratchet_gateway_leases",
            "Reservations of this worker that are not settled yet.",
            registry=registry,
        )
        self.settlements_waiting = Gauge(
            "ratchet_gateway_settlements_waiting",
            "Settlements on their way to the store of the limits.",
            registry=registry,
        )
        self.settlements_dropped = Counter(
            "ratchet_gateway_settlements_dropped",
            "Settlements lost because the store of the limits was down for too long.",
            registry=registry,
        )
        self.attempts = LoopCounter(
            "ratchet_gateway_upstream_attempts",
            "Attempts at upstreams by how they ended; 'ok' is an answer that came whole.",
            ["provider", "outcome"],
            registry=registry,
        )
        self.retries = Counter(
            "ratchet_gateway_upstream_retries",
            "Attempts after the first, by why the one before failed.",
            ["after"],
            registry=registry,
        )
        self.retries_refused = Counter(
            "ratchet_gateway_upstream_retries_refused",
            "Retries that the retry budget did not allow.",
            registry=registry,
        )
        self.breaker = Gauge(
            "ratchet_gateway_breaker_state",
            "Of a replica's circuit breaker: 0 closed, 1 half-open, 2 open.",
            ["provider", "model"],
            registry=registry,
        )
        self.upstream_queue = Gauge(
            "ratchet_gateway_upstream_queue",
            "Requests waiting in an engine, by its own metrics; NaN when it does not say.",
            ["provider", "model"],
            registry=registry,
        )
        self.tiers = LoopCounter(
            "ratchet_gateway_requests_by_tier",
            "Requests to models with tiers, by the tier that the classifier gave.",
            ["tier"],
            registry=registry,
        )
        self.guard_findings = Counter(
            "ratchet_gateway_guard_findings",
            "Findings by guard, side (input, passages, output) and what was done.",
            ["guard", "side", "action"],
            registry=registry,
        )
        self.guard_failures = Counter(
            "ratchet_gateway_guard_failures",
            "Guards without a verdict, by how they failed and whether the request went on (open).",
            ["guard", "outcome", "policy"],
            registry=registry,
        )
        self.guard_seconds = LoopHistogram(
            "ratchet_gateway_guard_seconds",
            "All guards of one side together, waiting included.",
            ["side"],
            buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            registry=registry,
        )
        self.guard_dropped = Counter(
            "ratchet_gateway_guard_dropped",
            "Texts that guards in mode async did not read because their queue was full.",
            registry=registry,
        )
        self.reloads = Counter(
            "ratchet_gateway_config_reloads",
            "Changes of the configuration file: taken, or refused and the old one kept.",
            ["outcome"],
            registry=registry,
        )
        self.cache_lookups = LoopCounter(
            "ratchet_gateway_cache_lookups",
            "Look-ups that a tier of the cache answered (hit) or did not (miss).",
            ["tier", "outcome"],
            registry=registry,
        )
        self.cache_bypass = LoopCounter(
            "ratchet_gateway_cache_bypass",
            "Requests that the cache is not for, by why.",
            ["reason"],
            registry=registry,
        )
        self.cache_stored = Counter(
            "ratchet_gateway_cache_stored", "Answers kept.", ["tier"], registry=registry
        )
        self.cache_refused = Counter(
            "ratchet_gateway_cache_refused",
            "Answers that may not be kept, by why.",
            ["reason"],
            registry=registry,
        )
        self.cache_evicted = Counter(
            "ratchet_gateway_cache_evicted",
            "Answers forgotten by this process: full, expired or purged.",
            ["reason"],
            registry=registry,
        )
        self.cache_failures = Counter(
            "ratchet_gateway_cache_failures",
            "Look-ups (get) and answers (put) that a tier's store or model did not take in time.",
            ["tier", "what"],
            registry=registry,
        )
        self.cache_saved = Counter(
            "ratchet_gateway_cache_saved_tokens",
            "Tokens of answers that came from the cache.",
            ["kind"],
            registry=registry,
        )
        self.cache_verified = Counter(
            "ratchet_gateway_cache_verified",
            "Would-be hits of the semantic tier that the model answered too; whether both agree.",
            ["outcome"],
            registry=registry,
        )
        self.cache_seconds = LoopHistogram(
            "ratchet_gateway_cache_seconds",
            "What a look-up in one tier took, waiting included.",
            ["tier"],
            buckets=(0.00001, 0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30),
            registry=registry,
        )
        self.cache_bytes = Gauge(
            "ratchet_gateway_cache_bytes", "Of answers in this process.", registry=registry
        )
        self.cache_entries = Gauge(
            "ratchet_gateway_cache_entries", "Answers in this process.", registry=registry
        )
        self.tpot = LoopHistogram(
            "ratchet_gateway_time_per_output_token_seconds",
            "Of streams: from the first text to the end, by the tokens after the first.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
            registry=registry,
        )
        self.overhead = LoopHistogram(
            "ratchet_gateway_overhead_seconds",
            "Of requests that reached an upstream: all the time in which it was not being waited "
            "for or relayed.",
            buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5),
            registry=registry,
        )
        self.model_tokens = LoopCounter(
            "ratchet_gateway_model_tokens",
            "Tokens by logical model and kind (prompt, completion).",
            ["model", "kind"],
            registry=registry,
        )
        self.cost = LoopCounter(
            "ratchet_gateway_cost",
            "Cost by the price table, by logical model and feature; features beyond the bound are "
            "'other'.",
            ["model", "feature"],
            registry=registry,
        )
        self.tenant_cost = LoopCounter(
            "ratchet_gateway_tenant_cost",
            "Cost by the price table, by tenant; tenants beyond the bound are 'other'.",
            ["tenant"],
            registry=registry,
        )
        self.traces_exported = Counter(
            "ratchet_gateway_traces_exported",
            "Sampled requests whose spans the collector took.",
            registry=registry,
        )
        self.traces_dropped = Counter(
            "ratchet_gateway_traces_dropped",
            "Sampled requests whose spans were lost, by why.",
            ["why"],
            registry=registry,
        )
        self.trace_queue = Gauge(
            "ratchet_gateway_trace_queue",
            "Sampled requests whose spans wait for the collector.",
            registry=registry,
        )
        self.audit_rows = Counter(
            "ratchet_gateway_audit_rows", "Events written to the audit log.", registry=registry
        )
        self.audit_dropped = Counter(
            "ratchet_gateway_audit_dropped",
            "Audit events lost because the queue was full or the disk refused them.",
            registry=registry,
        )
        self.feedback = Counter(
            "ratchet_gateway_feedback",
            "Feedback that was stored, by thumb (up, down, none).",
            ["thumb"],
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

    def trying(self, channel: str, candidate: Candidate | None) -> None:
        """Say which candidate has which share now."""
        self.candidate_share.clear()
        if candidate is not None:
            labels = (channel, candidate.release, candidate.strategy)
            self.candidate_share.labels(*labels).set(candidate.share)

    def text(self) -> bytes:
        return generate_latest(self.registry)
