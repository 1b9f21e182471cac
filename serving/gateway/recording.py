"""The record of a request: metrics, spans, audit log and request log, told of its end at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from contracts.settings import Settings
from serving.gateway.audit_log import AuditLog
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import Metrics
from serving.gateway.request_log import RequestLog
from serving.gateway.telemetry.config import Telemetry
from serving.gateway.telemetry.export import open_export
from serving.gateway.telemetry.recorder import Recorder
from serving.gateway.telemetry.spans import Trace, Tracer


class Recording:
    """Step 11 of the path.

    Args:
        settings: folders, and where spans go.
        config: the telemetry block. Its queue and its bounds hold as long as the process.
        metrics: of the gateway.
        salt: keys the hashes of sessions' names.
    """

    def __init__(
        self, settings: Settings, config: Telemetry, metrics: Metrics, salt: bytes
    ) -> None:
        self._metrics, self._salt = metrics, salt
        self.request_log = RequestLog(settings.requests_dir, metrics)
        self.audit = AuditLog(settings.state_dir / "audit", metrics)
        self._export = open_export(settings, metrics, limit=config.queue)
        self._tracer = Tracer(config, self._export)
        self._recorder = Recorder(metrics, config)
        self.noted: Callable[[str, str], None] = lambda response_id, tenant: None  # feedback's

    def start(self) -> None:
        self.request_log.start()
        self.audit.start()
        self.audit.event("started")
        if self._export is not None:
            self._export.start()

    async def close(self) -> None:
        """Write what waits; a collector that hangs costs 2 s."""
        self.audit.event("stopped")
        parts = [self.request_log.close, self.audit.close]
        if self._export is not None:
            parts.append(self._export.close)
        await asyncio.gather(*map(asyncio.to_thread, parts))

    def configure(self, config: Telemetry) -> None:
        """Use another ratio, or keep content or not, from the next request on."""
        self._tracer.configure(config)

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> Trace:
        """A request has arrived with these ASGI headers."""
        return self._tracer.begin(headers)

    def ended(self, exchange: Exchange) -> None:
        """A request has ended, however it did. Event loop; nothing here waits."""
        row = exchange.finish(self._metrics, self._salt)
        self._recorder.count(exchange, exchange.trace, row["latency_ms"] / 1000)
        self._tracer.finish(exchange.trace, exchange)
        self.audit.ended(exchange)
        self.request_log.offer(row)
        if row["tenant"]:
            self.noted(exchange.response_id, row["tenant"])
