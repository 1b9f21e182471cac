"""Names, trace context, span data and metrics of single requests; no collector yet."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Any

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from contracts.records import Passage, RequestRecord
from resources.keys import Key
from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.endpoint import Endpoint
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import Metrics
from serving.gateway.telemetry import context
from serving.gateway.telemetry.config import Telemetry
from serving.gateway.telemetry.names import LATEST, OPT_IN, names
from serving.gateway.telemetry.recorder import OTHER, Bounded, Recorder
from serving.gateway.telemetry.spans import SpanData, Tracer
from serving.gateway.telemetry.tally import LoopCounter, LoopHistogram
from serving.gateway.upstream_errors import Outcome, UpstreamError

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()
#: In the conventions' own repository, and not yet in the installed package.
NEWER = {"gen_ai.prompt.version"}


class Kept:
    """A sink that keeps."""

    def __init__(self) -> None:
        self.traces: list[tuple[SpanData, ...]] = []

    def offer(self, item: tuple[SpanData, ...]) -> bool:
        self.traces.append(item)
        return True


def exchange(**changes: Any) -> Exchange:
    found = Exchange("", "chat")
    values = {
        "model": "small", "provider": "local", "attempts": 2, "prompt_tokens": 40,
        "completion_tokens": 5, "cost": 0.25, "ttft_ms": 30.0, "stream": True, "feature": "search",
        "principal": Principal(Key(id="0123456789ab", tenant="acme", name="n")),
        "question": "What did jane.roe@corp-mail.com say?", "answer": ["She said no."], **changes,
    }  # fmt: skip
    for name, value in values.items():
        setattr(found, name, value)
    return found


ENGINE = Endpoint("local", "http://engine:8000", "nano")


def traced(
    tracer: Tracer, found: Exchange, *headers: tuple[bytes, bytes], outcome: Outcome = "ok"
) -> dict[str, str]:
    """A whole request; returns the headers that went upstream."""
    trace = tracer.begin(headers)
    trace.asked(ApiRequest("chat", "small", {"temperature": 0.5, "messages": []}, max_tokens=64))
    out = trace.call(ENGINE)
    trace.finish_reasons = ["stop"]
    trace.ended(outcome)
    tracer.finish(trace, found)
    return out


def test_every_name_is_one_of_the_conventions() -> None:
    """Those in use by default stand in the installed registry; the opt-in changes only gen_ai."""
    registry = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI_")}
    registry |= {v for k, v in vars(gen_ai_metrics).items() if k.startswith("GEN_AI_")}
    deployed, latest = names({}), names({OPT_IN: f"http, {LATEST}"})
    ours = {value for value in deployed.values() if value.startswith("gen_ai.")}
    assert ours - registry == NEWER
    assert set(deployed) == set(latest)
    assert all(
        value == latest[key] or latest[key].startswith("gen_ai.") for key, value in deployed.items()
    )
    assert latest["duration"] == "gen_ai.client.inference.duration"
    assert deployed["duration"] == "gen_ai.client.operation.duration"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"traceparent", PARENT), (b"traceparent", PARENT)],
        [(b"traceparent", PARENT.upper())],
        [(b"traceparent", b"ff" + PARENT[2:])],
        [(b"traceparent", PARENT + b"-more")],  # version 00 has nothing more
        [(b"traceparent", PARENT.replace(TRACE.encode(), b"0" * 32))],
        [(b"traceparent", PARENT.replace(SPAN.encode(), b"0" * 16))],
        [(b"traceparent", PARENT[:-1])],
        [(b"traceparent", b"\xff" * 55)],
        [(b"tracestate", b"a=1")],
    ],
)
def test_a_context_that_breaks_a_rule_is_none(headers: list[tuple[bytes, bytes]]) -> None:
    assert context.parent(headers) is None


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([b"a=1"], "a=1"),
        ([b"a=1 , b@c=x y", b"", b"d=2"], "a=1,b@c=x y,d=2"),
        ([b"a=1,a=2"], ""),
        ([b"A=1"], ""),
        ([b"a=1=2"], ""),
        ([b"a=\x01"], ""),
        ([b"a=" + b"x" * 510], ""),
        ([b",".join(b"k%d=1" % n for n in range(33))], ""),
    ],
)
def test_a_tracestate_is_kept_whole_or_dropped(states: list[bytes], kept: str) -> None:
    headers = [(b"traceparent", PARENT), *((b"tracestate", state) for state in states)]
    found = context.parent(headers)
    assert found is not None and found.state == kept
    later = context.parent([(b"traceparent", b"01" + PARENT[2:] + b"-later")])
    assert later is not None and later.sampled


def test_a_request_has_two_spans_under_the_callers() -> None:
    sink = Kept()
    out = traced(
        Tracer(Telemetry(), sink), exchange(), (b"traceparent", PARENT), (b"tracestate", b"a=1")
    )
    ((server, client),) = sink.traces
    assert out == {
        "traceparent": f"00-{TRACE}-{client.span_id:016x}-01",
        "tracestate": "a=1",
    }
    assert f"{server.trace_id:032x}" == f"{client.trace_id:032x}" == TRACE
    assert (f"{server.parent_id:016x}", client.parent_id) == (SPAN, server.span_id)
    assert server.remote and not client.remote
    assert server.start <= client.start <= client.end <= server.end
    assert abs(server.end - time.time_ns()) < 5e9
    assert (server.name, client.name) == ("POST /v1/chat/completions", "chat nano")
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["ratchet.tenant"] == "acme"
    first = client.attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0.0 < first <= 0.03
    assert client.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "local",
        "gen_ai.request.model": "nano", "gen_ai.request.stream": True, "ratchet.attempt": 1,
        "ratchet.outcome": "ok",
        "gen_ai.usage.input_tokens": 40, "gen_ai.usage.output_tokens": 5, "server.port": 8000,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.max_tokens": 64,
        "server.address": "engine", "gen_ai.response.finish_reasons": ("stop",),
    }  # fmt: skip
    assert not server.failed and not client.failed


def test_each_attempt_is_a_span_with_its_outcome() -> None:
    """What is known of the request stands on the last one, which alone has its tokens."""
    sink = Kept()
    tracer = Tracer(Telemetry(), sink)
    trace, found = tracer.begin([(b"traceparent", PARENT)]), exchange()
    first = trace.call(Endpoint("far", "https://far.example", "large"))["traceparent"]
    trace.ended("error")
    second = trace.call(ENGINE)["traceparent"]
    trace.ended("ok")
    tracer.finish(trace, found)
    ((server, failed, good),) = sink.traces
    assert [first[36:52], second[36:52]] == [f"{s.span_id:016x}" for s in (failed, good)]
    assert first[:35] == second[:35] and failed.span_id != good.span_id
    assert {s.parent_id for s in (failed, good)} == {server.span_id}
    assert server.start <= failed.start <= failed.end <= good.start <= good.end <= server.end
    assert failed.failed and not good.failed and server.attributes["ratchet.attempts"] == 2
    assert failed.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "far",
        "gen_ai.request.model": "large", "gen_ai.request.stream": True, "ratchet.attempt": 1,
        "ratchet.outcome": "error", "error.type": "engine_error", "server.port": 443,
        "server.address": "far.example",
    }  # fmt: skip
    assert good.attributes["ratchet.attempt"] == 2
    assert good.attributes["gen_ai.usage.output_tokens"] == 5


def test_a_request_that_is_not_sampled_keeps_nothing_of_its_attempts() -> None:
    trace = Tracer(Telemetry(sample_ratio=0.0), Kept()).begin([])
    sent = {trace.call(ENGINE)["traceparent"] for _ in range(3)}
    assert len(sent) == 3 and trace.calls == [] and trace.attempts == 3


def test_errors_are_the_upstreams_or_the_servers() -> None:
    sink = Kept()
    tracer = Tracer(Telemetry(), sink)
    error = UpstreamError("timeout", "It said: secret words")
    traced(tracer, exchange(error=error), outcome=error.outcome)
    traced(tracer, exchange(error=ApiError("invalid_request", "no")))
    tracer.finish(tracer.begin([]), exchange(error=ApiError("invalid_api_key", "no")))
    (server, client), (bad, fine), (alone,) = sink.traces
    assert server.failed and client.failed and client.attributes["error.type"] == "engine_timeout"
    assert "secret words" not in str(sink.traces)
    # 4xx is the client's doing, and no failure of a server (HTTP conventions).
    assert not bad.failed and bad.attributes["error.type"] == "invalid_request"
    assert not fine.failed and "error.type" not in fine.attributes
    assert alone.attributes["http.response.status_code"] == 401


def test_text_is_in_spans_only_where_it_is_asked_for() -> None:
    sink = Kept()
    traced(Tracer(Telemetry(), sink), exchange())
    assert "jane.roe" not in str(sink.traces) and "She said" not in str(sink.traces)
    traced(Tracer(Telemetry(content=True), sink), exchange())
    message = sink.traces[1][1].attributes["gen_ai.output.messages"][0]
    assert message == {
        "role": "assistant", "parts": [{"type": "text", "content": "She said no."}]}  # fmt: skip


def test_the_head_decides_and_the_decision_goes_on() -> None:
    sink = Kept()
    tracer = Tracer(Telemetry(sample_ratio=0.0), sink)
    assert traced(tracer, exchange())["traceparent"].endswith("-00")
    assert traced(tracer, exchange(), (b"traceparent", PARENT))["traceparent"].endswith("-01")
    assert len(sink.traces) == 1  # the caller's word counts
    tracer.configure(Telemetry(sample_ratio=1.0))
    not_sampled = PARENT[:-1] + b"0"
    assert traced(tracer, exchange(), (b"traceparent", not_sampled))["traceparent"].endswith("-00")
    assert len(sink.traces) == 1
    tracer.configure(Telemetry(sample_ratio=0.25))
    for _ in range(4000):
        traced(tracer, exchange())
    assert 850 < len(sink.traces) - 1 < 1150  # 1000 +- 5.5 standard deviations


def test_without_a_sink_the_callers_context_passes_through_unchanged() -> None:
    tracer = Tracer(Telemetry(), None)
    headers = [(b"traceparent", PARENT), (b"tracestate", b"a=1")]
    out = traced(tracer, exchange(), *headers)
    assert out == {"traceparent": PARENT.decode(), "tracestate": "a=1"}
    assert traced(tracer, exchange()) == {}
    assert traced(tracer, exchange(), (b"traceparent", b"junk")) == {}


def recorded(*exchanges: Exchange, config: Telemetry | None = None) -> Metrics:
    metrics = Metrics()
    recorder = Recorder(metrics, config or Telemetry())
    for found in exchanges:
        trace = Tracer(Telemetry(), None).begin([])
        trace.call(Endpoint("local", "http://engine:8000", "small"))
        trace.ended("ok")
        recorder.count(found, trace, 0.5)
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_request_is_counted_by_model_feature_and_tenant() -> None:
    metrics = recorded(exchange(), exchange(error=ApiError("engine_error", "x"), stream=False))
    assert value(metrics, "ratchet_gateway_requests_total",
                 code="ok", status="200", stream="true") == 1  # fmt: skip
    assert value(metrics, "ratchet_gateway_engine_errors_total", code="engine_error") == 1
    assert value(metrics, "ratchet_gateway_cost_total", model="small", feature="search") == 0.5
    assert value(metrics, "ratchet_gateway_tenant_cost_total", tenant="acme") == 0.5
    assert value(metrics, "ratchet_gateway_model_tokens_total", model="small", kind="prompt") == 80
    assert value(metrics, "ratchet_gateway_tokens_total", kind="completion") == 10
    # (0.5 s - 0.03 s) by the four tokens after the first
    total = value(metrics, "ratchet_gateway_time_per_output_token_seconds_sum")
    assert total == pytest.approx(0.47 / 4)
    # Nothing was waited for: all of it was the gateway's.
    spent = value(metrics, "ratchet_gateway_overhead_seconds_sum")
    assert spent == pytest.approx(1.0, abs=0.05)
    labels = {
        "gen_ai_operation_name": "chat", "gen_ai_provider_name": "local",
        "gen_ai_request_model": "small",
    }  # fmt: skip
    assert value(metrics, "gen_ai_client_operation_duration_seconds_count",
                 **labels, error_type="engine_error") == 1  # fmt: skip
    assert value(metrics, "gen_ai_client_token_usage_sum",
                 **labels, gen_ai_token_type="input") == 40  # fmt: skip
    assert "acme" not in "".join(
        line for line in metrics.text().decode().splitlines() if line.startswith("gen_ai")
    )


def test_the_latest_names_are_an_opt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPT_IN, LATEST)
    text = recorded(exchange()).text().decode()
    assert "gen_ai_client_inference_operation_input_tokens_sum" in text
    assert "gen_ai_client_operation" not in text and "token_usage" not in text


def test_clients_cannot_make_labels() -> None:
    bounded = Bounded(2)
    assert [bounded(name) for name in ("a", "b", "c", "a", "", "c")] == [
        "a", "b", OTHER, "a", "", OTHER]  # fmt: skip
    assert Bounded(9)("jane.roe@corp-mail.com") == OTHER == Bounded(9)("x" * 65)
    many = [exchange(feature=f"f{n}") for n in range(60)]
    metrics = recorded(*many, config=Telemetry(features=5))
    text = metrics.text().decode()
    assert text.count("ratchet_gateway_cost_total{") == 6
    assert value(metrics, "ratchet_gateway_cost_total",
                 model="small", feature=OTHER) == 55 * 0.25  # fmt: skip


ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "empty": {"answer": [], "principal": None, "prompt_tokens": None, "completion_tokens": None,
              "ttft_ms": None, "cost": 0.0},
    "failed": {"error": ApiError("engine_timeout", "late"), "session": "Jane's"},
    "passages": {"passages": [Passage(n=1, chunk_id="a#1-2", path="a", title="", heading="",
                                      text="x", score=0.5)], "answer": ["It is so [1]. \ud800"]},
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_the_log_is_a_record_without_having_been_checked(case: str) -> None:
    found = exchange(**ROWS[case])
    row = found.finish(Metrics(), b"salt")
    record = RequestRecord.model_validate(row, strict=True)
    assert record.model_dump() == row
    assert set(row) == set(RequestRecord.model_fields)
    assert record.time.endswith("Z") and datetime.fromisoformat(record.time).tzinfo is not None
    assert record.cited == ([1] if case == "passages" else [])
    assert "Jane" not in record.session


def test_a_count_that_no_engine_can_mean_is_none() -> None:
    found = exchange(prompt_tokens=None, completion_tokens=None)
    for wrong in (True, -1, 1 << 70, "7", 7.0, None):
        found.usage({"prompt_tokens": wrong, "completion_tokens": wrong})
    found.usage(None)
    assert (found.prompt_tokens, found.completion_tokens) == (None, None)
    found.usage({"prompt_tokens": 0, "completion_tokens": 7})
    assert (found.prompt_tokens, found.completion_tokens) == (0, 7)


def test_the_loops_own_metrics_are_scraped_as_prometheus_clients_are() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.1, 1, 2.5)
    for labels in ((), ("model", "kind")):
        name = "labelled" if labels else "bare"
        for registry, counter, histogram in (
            (ours, LoopCounter, LoopHistogram), (theirs, Counter, Histogram)
        ):  # fmt: skip
            count = counter(name, "What it is.", labels, registry=registry)
            seen = histogram(f"{name}_s", "What it is.", labels, buckets=bounds, registry=registry)
            for number, value in enumerate((0.05, 0.1, 0.2, 1, 2.5, 2.6, 40)):
                values = (f"m{number % 2}", 'a"b') if labels else ()
                (count.labels(*values) if labels else count).inc(value)
                (seen.labels(*values) if labels else seen).observe(value)
            if labels:
                with seen.labels("m0", "timed").time():
                    pass

    def scraped(registry: CollectorRegistry) -> list[str]:
        lines = generate_latest(registry).decode().splitlines()
        lines = [line for line in lines if "_created" not in line]
        return [re.sub(r"[0-9.e-]+$", "", line) if "_s_sum" in line else line for line in lines]

    assert scraped(ours) == scraped(theirs) and len(scraped(ours)) > 20
    total = ours.get_sample_value("bare_s_sum") or 0.0
    assert abs(total - 46.45) < 0.01
    with pytest.raises(ValueError, match="Duplicated"):
        LoopCounter("bare", "Once more.", registry=ours)
