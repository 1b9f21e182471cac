"""HTTP/1.1 at the door: uvicorn's protocol over llhttp, stricter, with a deadline for each wait.

llhttp refuses what is ambiguous in framing (both lengths, two lengths, folded headers, bare LF).
Refused here: what leaves open whom a request is for, and what could be read in two ways by a proxy
before us. Waits that uvicorn does not end: a head that never ends, a body that goes on after its
answer, an answer that nobody reads. And of several requests on one connection, uvicorn tells only
the last that its client left; here the one that is being answered hears of it.

An offer to speak another protocol (``Upgrade: h2c``, which Java's client makes by default) is
ignored, as RFC 9110 section 7.8 allows. llhttp would take what follows the head for that protocol:
the body would be lost, or be read as a request of its own.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from asyncio import TimerHandle, Transport
from datetime import UTC, datetime
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from resources.requests import new_response_id
from serving.gateway.api_request import PATHS
from serving.gateway.envelope import ApiError
from serving.gateway.http_cycle import EXTENSION, Cycle

#: A head comes in one packet, or in a few; 64 KiB is four times what other servers take.
HEAD_SECONDS = 10.0
HEAD_BYTES = 64 << 10
#: For the rest of a body that was refused, and for the last bytes to a client that does not read.
LINGER_SECONDS = 2.0
#: Paths that need no parsing.
_KNOWN = {path.encode(): path for path in PATHS.values()}
_HOST = re.compile(rb"[A-Za-z0-9.\-_]*(?::[0-9]{0,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{0,5})?")


class Protocol(HttpToolsProtocol):
    """One connection. Give the class to ``uvicorn.Config(http=...)``."""

    head_seconds, linger_seconds = HEAD_SECONDS, LINGER_SECONDS

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._timer: TimerHandle | None = None  # of the head, or of what lingers
        self._writing: TimerHandle | None = None
        self._answering: Cycle | None = None
        self._between = True  # no request has begun, or the last one is here whole
        self._head = 0  # bytes of the head that has begun
        self._idle_since = 0.0  # by the loop's clock; 0: not idle
        self._refused = ""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.gone()
        self._answering = None
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between and data[0] in b"\r\n" and not data.strip(b"\r\n"):
            return  # empty lines before a request are allowed, and are not life
        self._idle_since = 0.0
        self._read(data)
        if self._head:  # begun and not at its end
            self._head += len(data)
            if self._head > HEAD_BYTES and not self.transport.is_closing():
                self._refused = f"The head has more than {HEAD_BYTES} bytes."
                self.send_400_response("")
            elif self._timer is None:
                self._timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _read(self, data: bytes) -> None:
        """Parse. A head with an offer is parsed again without it, by a parser that saw none."""
        while data:
            rest = b""
            try:
                self.parser.feed_data(data)
            except HttpParserUpgrade as offer:
                rest = self._head_without_offer() + data[offer.args[0] :]
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            except HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("")
            data = rest

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between, self._head = False, 1

    def on_headers_complete(self) -> None:
        self._head = 0
        self._stop_timer()
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self._refused = self._wrong(method, version)
        if self._refused:
            raise ValueError(self._refused)  # the parser makes it an error of its own
        if self.parser.should_upgrade():
            return  # comes again, see _read
        self._to_scope(method, version)
        before = self.cycle
        self.cycle = cycle = Cycle(
            self.scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and self.parser.should_keep_alive(),
            self.on_response_complete,
        )
        self.scope["extensions"] = {EXTENSION: cycle}  # type: ignore[dict-item]
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:  # in its turn
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _to_scope(self, method: bytes, version: str) -> None:
        """What the first line of the head says."""
        scope = self.scope
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        path = _KNOWN.get(self.url)
        if path is not None:
            scope["path"], scope["raw_path"], scope["query_string"] = path, self.url, b""
            return
        parsed = parse_url(self.url)
        scope["path"] = urllib.parse.unquote(parsed.path.decode("ascii"))
        scope["raw_path"], scope["query_string"] = parsed.path, parsed.query or b""

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._keep(self.timeout_keep_alive)
        if not self._between:
            # Refused before the body was here. Closing at once could lose the answer.
            self._stop_timer()
            self._timer = self.loop.call_later(self.linger_seconds, self._close)

    def _keep(self, seconds: float) -> None:
        """Look after so long whether the connection is idle: one timer, and none per request."""
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.linger_seconds, self._is_read)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if not self._idle_since:
            return  # the next answer's end sets it anew
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._keep(left)
        else:
            self._close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way to refuse what is no request; in our envelope."""
        if self.transport.is_closing():
            return
        answering = self._answering
        if answering is not None and not answering.response_complete:
            self._close()  # an error in the middle of an answer would be taken for its text
            return
        error = ApiError("invalid_request", self._refused or "That is no valid HTTP request.")
        self._tell(error)

    def _tell(self, error: ApiError) -> None:
        request_id = new_response_id(datetime.now(UTC))
        body = error.body(request_id)
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self._close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        assert isinstance(cycle, Cycle)
        self._answering = cycle
        cycle.task = task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _wrong(self, method: bytes, version: str) -> str:
        """Why this head may not go on; "" when it may."""
        if not self.url.startswith(b"/") or method == b"CONNECT":
            return "The request's target must be a path."
        if version not in ("1.1", "1.0"):
            return "The server speaks HTTP/1.1."
        hosts, coding = [], None
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                coding = value if coding is None else coding + b", " + value
        if len(hosts) != 1 and (hosts or version == "1.1"):
            return "A request has exactly one Host."
        if hosts and _HOST.fullmatch(hosts[0]) is None:
            return "The Host is no host."
        if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
            return "The only transfer coding is chunked."
        return ""

    def _head_is_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            if self._head:
                self._tell(ApiError("request_timeout", "The request's head did not come in time."))
            else:
                self._close()

    def _is_read(self) -> None:
        """Look again at an answer that is not read; the handler decides how long that may last."""
        self._writing = None
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self._writing = self.loop.call_later(self.linger_seconds, self._is_read)

    def _close(self) -> None:
        """Close when what was written is out; a peer that does not take it is cut off."""
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()
        self._timer = self.loop.call_later(self.linger_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
