"""One worker: uvicorn around the application, and its end in order.

SIGTERM or SIGINT: /readyz says 503 at once; for ``notice`` more seconds connections are still
taken, so that a load balancer that asks /readyz stops sending before anybody is turned away; then
no new connection is taken, answers in flight get ``drain`` seconds, and the logs are flushed. A
second signal does not wait for the notice. SIGHUP reads the configuration again.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from contracts.settings import Settings
from serving.gateway.app import Gateway, create_app
from serving.gateway.http_protocol import Protocol
from serving.gateway.listening import LOGGING, address

log = logging.getLogger("ratchet.gateway.server")
#: Seconds for which a thread may hold Python's lock while the loop wants it; 5 ms by default, which
#: the writer of the request log would take at each of the loop's system calls.
SWITCH_SECONDS = 0.001
#: What is loaded at the start (half a million objects) is put aside; else the collector walked
#: through it three times a second under load, 80 ms each, while every stream stood still.
COLLECT_AFTER = (10_000, 20, 50)


class Server(uvicorn.Server):
    """See the module.

    Args:
        config: uvicorn's.
        gateway: whose readiness follows the signals.
        notice: seconds.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway, notice: float) -> None:
        super().__init__(config)
        self._gateway, self._notice = gateway, notice
        self._ends_at = float("inf")  # time.monotonic() when the listener closes
        self._reload: asyncio.Task[bool] | None = None
        gateway.services.draining = lambda: self._ends_at < float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, say so with one JSON line, and settle the runtime."""
        await super().startup(sockets=sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reread)
        self._gateway.metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        sys.setswitchinterval(SWITCH_SECONDS)
        print(json.dumps({"url": address((sockets or [])[0]), "pid": os.getpid()}), flush=True)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._ends_at

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again at the end; a clean end has exit status 0.
        if self._ends_at == float("inf"):
            self._ends_at = time.monotonic() + self._notice
        elif not self.should_exit:
            self.should_exit = True
        elif sig == signal.SIGINT:
            self.force_exit = True

    def _reread(self) -> None:
        self._reload = asyncio.ensure_future(self._gateway.reload())


def serve(
    settings: Settings,
    sockets: Sequence[socket.socket],
    *,
    channel: str,
    drain: int,
    notice: float,
    workers: int,
) -> None:
    """Run one worker until a signal. Raises ConfigError.

    Args:
        sockets: bound; the first is the gateway's, a second one this worker's own.
        workers: how many share the first.
    """
    host = sockets[0].getsockname()[0]
    gateway = Gateway(settings, channel=channel, host=host, workers=workers)
    config = uvicorn.Config(
        create_app(gateway),
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,  # the request log is the record; a line a request costs as much as auth
        server_header=False,
        date_header=True,
        proxy_headers=False,  # nothing here believes who a client says it is
        log_config=LOGGING,
        timeout_graceful_shutdown=drain,
        timeout_keep_alive=30,
    )
    Server(config, gateway, notice).run(sockets=list(sockets))
