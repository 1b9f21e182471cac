"""Spans to a collector over OTLP/HTTP, from a thread of their own behind a bounded queue.

Where to: ``OTEL_EXPORTER_OTLP_ENDPOINT``, else the MLflow server that MLFLOW_TRACKING_URI names
(its ``/v1/traces`` needs the id of an experiment, which is asked for by name), else nowhere.
``OTEL_EXPORTER_OTLP_HEADERS`` goes along, for collectors that want a key.

OpenTelemetry's BatchSpanProcessor is not used: it drops without a number that can be scraped,
writes a line for each drop, and its shutdown waits 30 s for a collector that hangs. The SDK's
exporter does the sending: headers, certificates, compression and retries are as its variables say.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.util.re import parse_env_headers

from contracts.settings import Settings
from serving.gateway.drain import Drain
from serving.gateway.metrics import Metrics
from serving.gateway.telemetry.encode import Encoder
from serving.gateway.telemetry.spans import SpanData

log = logging.getLogger("ratchet.gateway.telemetry")
EXPERIMENT = "ratchet-gateway"
#: For one batch, retries included: the first takes an MLflow that has just started 8 s. Then it is
#: dropped; the queue behind it fills up meanwhile.
TIMEOUT = 30.0
#: Seconds between two batches: each costs 2 ms in the client that sends it.
EVERY = 0.5
#: Requests in one batch: 512 spans.
BATCH = 256
#: Between two questions for the experiment's id.
ASK_AGAIN = 10.0


def destination(settings: Settings) -> tuple[str, str]:
    """(URL of the traces endpoint, address of the MLflow server that wants an experiment's id);
    both "" where nothing is exported to."""
    if settings.otlp_endpoint:
        base = settings.otlp_endpoint.rstrip("/")
        return (base if base.endswith("/v1/traces") else f"{base}/v1/traces"), ""
    if settings.mlflow_uri.startswith(("http://", "https://")):
        base = settings.mlflow_uri.rstrip("/")
        return f"{base}/v1/traces", base
    return "", ""


class _Sender(OTLPSpanExporter):
    """Sends what is encoded already; the public ``export`` would encode the SDK's own spans."""

    def send(self, data: bytes) -> bool:
        return bool(self._client.export(data).success)


class SpanExport:
    """The queue and its thread. ``offer`` takes the spans of one request.

    Args:
        url, mlflow: as ``destination`` gives them.
        metrics: counts spans that arrived and those that were dropped, by why.
        limit: requests that may wait.
        timeout: seconds for one batch.
    """

    def __init__(
        self,
        url: str,
        mlflow: str,
        metrics: Metrics,
        *,
        limit: int = 4096,
        timeout: float = TIMEOUT,
    ) -> None:
        self._url, self._mlflow, self._metrics, self._timeout = url, mlflow, metrics, timeout
        self._exporter: _Sender | None = None
        self._encode = Encoder()
        self._asked = float("-inf")
        self._drain: Drain[tuple[SpanData, ...]] = Drain(
            "span-export",
            self._send,
            metrics.traces_dropped.labels("queue_full"),
            limit=limit,
            batch=BATCH,
            every=EVERY,
        )
        self.start, self.offer = self._drain.start, self._drain.offer
        metrics.trace_queue.set_function(self._drain.__len__)

    def close(self, seconds: float = 2.0) -> None:
        """Send what waits, for so long at most. Blocks; a collector that hangs costs no more."""
        self._drain.close(seconds)
        if self._exporter is not None:
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _send(self, traces: list[tuple[SpanData, ...]]) -> None:
        exporter = self._exporter or self._open()
        if exporter is None:
            self._metrics.traces_dropped.labels("unreachable").inc(len(traces))
            return
        if not exporter.send(self._encode(traces)):
            self._metrics.traces_dropped.labels("refused").inc(len(traces))
            return
        self._metrics.traces_exported.inc(len(traces))

    def _open(self) -> _Sender | None:
        """The exporter; None while MLflow does not name an experiment."""
        headers = {}
        if self._mlflow:
            if time.monotonic() - self._asked < ASK_AGAIN:
                return None
            self._asked = time.monotonic()
            try:
                headers["x-mlflow-experiment-id"] = experiment_id(self._mlflow)
            except (OSError, ValueError, KeyError) as error:
                log.error("MLflow names no experiment for traces: %s", type(error).__name__)
                return None
        self._exporter = _Sender(endpoint=self._url, headers=headers, timeout=self._timeout)
        return self._exporter


def experiment_id(base: str, seconds: float = 3.0) -> str:
    """The id of EXPERIMENT on that MLflow server, which makes it if it must.

    Raises OSError (urllib's errors are such), ValueError or KeyError for answers of something else.
    """

    more = parse_env_headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""), liberal=True)

    def ask(path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{base}/api/2.0/mlflow/experiments/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json", **more},
        )
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return dict(json.loads(response.read(1 << 20)))

    name = urllib.parse.quote(EXPERIMENT)
    look_up = f"get-by-name?experiment_name={name}"
    try:
        return str(ask(look_up)["experiment"]["experiment_id"])
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    try:
        return str(ask("create", {"name": EXPERIMENT})["experiment_id"])
    except urllib.error.HTTPError:  # another worker was faster
        return str(ask(look_up)["experiment"]["experiment_id"])


def open_export(settings: Settings, metrics: Metrics, *, limit: int) -> SpanExport | None:
    """The exporter for these settings; None when no address is set."""
    url, mlflow = destination(settings)
    return SpanExport(url, mlflow, metrics, limit=limit) if url else None
