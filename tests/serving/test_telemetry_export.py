"""Spans on their way: to a collector that takes them, refuses, hangs or is not there; to MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.settings import Settings
from serving.gateway.metrics import Metrics
from serving.gateway.telemetry.config import Telemetry
from serving.gateway.telemetry.export import SpanExport, destination, open_export
from serving.gateway.telemetry.spans import Tracer
from tests.conftest import free_port
from tests.serving.collector import Collector, attributes
from tests.serving.conftest import until
from tests.serving.test_telemetry import PARENT, SPAN, TRACE, exchange, traced

SECRET = "sk-proj-" + "Qz7Wx2Lm9Kp4Rt8Vb3Nc6Yd1Hf5Jg0Sa"


def dropped(metrics: Metrics, why: str) -> float:
    name = "ratchet_gateway_traces_dropped_total"
    return metrics.registry.get_sample_value(name, {"why": why}) or 0.0


def exported(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("ratchet_gateway_traces_exported_total") or 0.0


def test_where_spans_go_is_an_address(settings: Settings) -> None:
    def to(**changes: Any) -> tuple[str, str]:
        return destination(replace(settings, **changes))

    assert to() == ("", "")
    assert open_export(settings, Metrics(), limit=1) is None
    assert to(mlflow_uri="sqlite:///x.db") == ("", "")
    assert to(mlflow_uri="http://m:5000/") == ("http://m:5000/v1/traces", "http://m:5000")
    assert to(otlp_endpoint="http://c:4318", mlflow_uri="http://m") == (
        "http://c:4318/v1/traces", "")  # fmt: skip
    assert to(otlp_endpoint="http://c/v1/traces")[0] == "http://c/v1/traces"


def test_a_collector_gets_both_spans_whole(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=abc")
    metrics = Metrics()
    with Collector() as collector:
        sink = open_export(replace(settings, otlp_endpoint=collector.url), metrics, limit=10)
        assert sink is not None
        sink.start()
        tracer = Tracer(Telemetry(content=True), sink)
        traced(tracer, exchange(answer=[f"Grüße, {SECRET}"]), (b"traceparent", PARENT))
        traced(tracer, exchange())
        sink.close(10)
        assert exported(metrics) == 2
        assert collector.paths == ["/v1/traces"]
        assert collector.headers[0]["x-collector-key"] == "abc"
        assert collector.headers[0]["content-type"] == "application/x-protobuf"
        server, client, other, _ = collector.spans
    assert (server.kind, client.kind) == (2, 3)  # SERVER, CLIENT
    assert server.trace_id.hex() == TRACE and server.parent_span_id.hex() == SPAN
    assert client.parent_span_id == server.span_id and other.parent_span_id == b""
    assert 0 < server.start_time_unix_nano <= client.end_time_unix_nano
    found = attributes(client)
    assert found["gen_ai.usage.input_tokens"] == 40 and found["gen_ai.request.stream"] is True
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert "Grüße, XX-XXXX-XXX" in found["gen_ai.output.messages"]  # masked on its way
    assert "jane.roe" not in found["gen_ai.input.messages"]
    resource = collector.requests[0].resource_spans[0].resource
    assert attributes(resource) == {"service.name": "ratchet-gateway"}


def test_a_collector_that_hangs_costs_nothing_but_its_spans() -> None:
    metrics = Metrics()
    with Collector("hang") as collector:
        sink = SpanExport(f"{collector.url}/v1/traces", "", metrics, limit=50, timeout=0.5)
        sink.start()
        tracer = Tracer(Telemetry(), sink)
        traced(tracer, exchange())
        until(lambda: collector.waiting)
        begun = time.perf_counter()
        for _ in range(500):
            traced(tracer, exchange())
        # 9 us each; the machine may be busy with something else.
        assert time.perf_counter() - begun < 0.5
        assert dropped(metrics, "queue_full") >= 400
        until(lambda: dropped(metrics, "refused"))  # the batch that hung
        begun = time.perf_counter()
        sink.close(0.2)
        assert time.perf_counter() - begun < 3
        assert exported(metrics) == 0


@pytest.mark.parametrize("mode", ["refuse", "gone"])
def test_a_collector_that_refuses_or_is_gone_is_counted(mode: str) -> None:
    metrics = Metrics()
    with Collector(mode) as collector:
        url = collector.url if mode == "refuse" else f"http://127.0.0.1:{free_port()}"
        sink = SpanExport(f"{url}/v1/traces", "", metrics, timeout=0.3)
        sink.start()
        tracer = Tracer(Telemetry(), sink)
        traced(tracer, exchange())
        until(lambda: dropped(metrics, "refused") == 1)
        if mode == "refuse":  # and back again
            collector.mode = ""
            traced(tracer, exchange())
            until(lambda: exported(metrics) == 1)
        sink.close(1)


def test_an_mlflow_that_is_not_there_is_counted() -> None:
    metrics = Metrics()
    base = f"http://127.0.0.1:{free_port()}"
    sink = SpanExport(f"{base}/v1/traces", base, metrics)
    sink.start()
    traced(Tracer(Telemetry(), sink), exchange())
    until(lambda: dropped(metrics, "unreachable") == 1)
    sink.close(1)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--workers", "1",
             "--default-artifact-root", str(tmp_path / "artifacts")],
            stdout=log, stderr=log, start_new_session=True, cwd=tmp_path,
            env={**os.environ, "MLFLOW_TRACKING_URI": ""},
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        try:
            return bool(urllib.request.urlopen(f"{url}/health", timeout=1).status == 200)
        except OSError:
            return False

    try:
        until(answers, 90)
        yield url
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.mark.slow
def test_mlflow_is_the_default_sink(settings: Settings, mlflow_server: str) -> None:
    """A real server: its experiment is made, both spans arrive, and it knows the tokens."""
    import mlflow

    metrics = Metrics()
    sink = open_export(replace(settings, mlflow_uri=mlflow_server), metrics, limit=100)
    assert sink is not None
    sink.start()
    tracer = Tracer(Telemetry(content=True), sink)
    for _ in range(3):
        traced(tracer, exchange())
    until(lambda: exported(metrics) == 3, 60)
    sink.close(5)
    client = mlflow.MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("ratchet-gateway")
    traces = client.search_traces(locations=[experiment.experiment_id])
    assert len(traces) == 3
    spans = {span.name: span for span in traces[0].data.spans}
    assert set(spans) == {"POST /v1/chat/completions", "chat nano"}
    call = spans["chat nano"]
    assert call.parent_id == spans["POST /v1/chat/completions"].span_id
    assert call.attributes["gen_ai.usage.output_tokens"] == 5
    assert call.span_type == "CHAT_MODEL"
    assert traces[0].info.token_usage == {
        "input_tokens": 40, "output_tokens": 5, "total_tokens": 45}  # fmt: skip
