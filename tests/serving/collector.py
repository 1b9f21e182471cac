"""An OTLP collector on a real socket that parses what it gets, and can hang or refuse."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    return getattr(value, kind)


class Collector:
    """Use as ``with Collector() as collector``. ``mode``: "", "hang" or "refuse"."""

    def __init__(self, mode: str = "") -> None:
        self.mode = mode
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.waiting = 0
        self._let_go = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                outer.paths.append(self.path)
                if outer.mode == "hang":
                    outer.waiting += 1
                    outer._let_go.wait(60)
                    return
                if outer.mode == "refuse":
                    self.send_response(400)
                    self.end_headers()
                    return
                parsed = ExportTraceServiceRequest()
                parsed.ParseFromString(data)
                outer.headers.append({k.lower(): v for k, v in self.headers.items()})
                outer.requests.append(parsed)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=lambda: self._server.serve_forever(0.02), daemon=True
        )

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: _plain(item.value) for item in span.attributes}
