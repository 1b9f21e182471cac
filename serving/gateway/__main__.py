"""``python -m serving.gateway``: the gateway in the foreground, until SIGTERM.

SIGTERM and SIGINT drain: /readyz says 503, no new connection is taken (after ``--drain-notice``
seconds), answers in flight get ``--drain-timeout`` seconds, the logs are flushed. SIGHUP reads the
configuration again. With ``--workers N`` a supervisor runs N such processes behind one socket.
Prints one JSON line {"url", "pid"} when it listens, with several workers also "workers": a pid and
an address of its own each, where its /metrics are.
"""

from __future__ import annotations

import argparse
import socket
import sys

from contracts import offline
from contracts.errors import InputError, RatchetError
from contracts.settings import Settings
from serving.gateway.listening import LOGGING, listen

MAX_WORKERS = 256


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument("--host", help="address to listen on; RATCHET_HOST by default")
    parser.add_argument("--port", type=int, help="RATCHET_GATEWAY_PORT by default; 0: a free one")
    parser.add_argument("--channel", default="stable")
    parser.add_argument("--drain-timeout", type=int, default=30, help="seconds for open answers")
    parser.add_argument(
        "--drain-notice", type=float, default=0.0, help="seconds of 503 at /readyz before that"
    )
    parser.add_argument("--workers", type=int, help="RATCHET_GATEWAY_WORKERS by default, else 1")
    parser.add_argument(
        "--metrics-port", type=int, default=9464,
        help="of the first of several workers, on the loopback address; 0: free ones",
    )  # fmt: skip
    parser.add_argument("--sockets", help=argparse.SUPPRESS)  # a worker's, from its supervisor
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)
    offline.apply()
    try:
        settings = Settings.from_env()
        workers = settings.gateway_workers if given.workers is None else given.workers
        if not 1 <= workers <= MAX_WORKERS:
            raise InputError(f"--workers is {workers}.", next=f"give 1 to {MAX_WORKERS}")
        if given.sockets:
            sockets = [socket.socket(fileno=int(number)) for number in given.sockets.split(",")]
        else:
            port = settings.gateway_port if given.port is None else given.port
            sockets = [listen(given.host or settings.host, port)]
        if workers > 1 and not given.sockets:
            return _supervise(argv, given, sockets[0], workers)
        from serving.gateway.server import serve

        serve(
            settings,
            sockets,
            channel=given.channel,
            drain=given.drain_timeout,
            notice=given.drain_notice,
            workers=workers,
        )
    except RatchetError as error:
        print(f"gateway: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _supervise(
    argv: list[str], given: argparse.Namespace, shared: socket.socket, workers: int
) -> int:
    import logging.config

    from serving.gateway.supervisor import Supervisor, command

    logging.config.dictConfig(LOGGING)
    base = given.metrics_port
    own = [listen("127.0.0.1", base + number if base else 0) for number in range(workers)]
    patience = given.drain_timeout + given.drain_notice + 15.0
    return Supervisor(command(argv), shared, own, patience).run()


if __name__ == "__main__":
    sys.exit(main())
