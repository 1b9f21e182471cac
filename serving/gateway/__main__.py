"""``python -m serving.gateway``: the gateway in the foreground, until SIGTERM.

SIGTERM and SIGINT drain: no new connection is taken, answers in flight get ``--drain-timeout``
seconds, the request log is flushed. Prints one JSON line {"url", "pid"} when it listens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys

from contracts import offline
from contracts.errors import RatchetError, ServiceError
from contracts.settings import Settings


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument("--host", help="address to listen on; RATCHET_HOST by default")
    parser.add_argument("--port", type=int, help="RATCHET_GATEWAY_PORT by default; 0: a free one")
    parser.add_argument("--channel", default="stable")
    parser.add_argument("--drain-timeout", type=int, default=30, help="seconds for open answers")
    return parser.parse_args(argv)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, bound before anything slow. Raises ServiceError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ServiceError(
            f"The gateway cannot listen: {error.strerror}.",
            where=f"{host}:{port}",
            next="end what listens there, or set RATCHET_GATEWAY_PORT",
        ) from None
    found.set_inheritable(False)
    return found


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    offline.apply()
    try:
        settings = Settings.from_env()
        port = settings.gateway_port if given.port is None else given.port
        sock = listen(given.host or settings.host, port)
        serve(settings, sock, given.channel, given.drain_timeout)
    except RatchetError as error:
        print(f"gateway: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def serve(settings: Settings, sock: socket.socket, channel: str, drain: int) -> None:
    """Run until a signal."""
    import uvicorn

    from serving.gateway.app import Gateway, create_app

    host, port = sock.getsockname()[:2]
    gateway = Gateway(settings, channel=channel, host=host)
    config = uvicorn.Config(
        create_app(gateway),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,  # the request log is the record; a line a request costs as much as auth
        server_header=False,
        date_header=True,
        log_config=LOGGING,
        timeout_graceful_shutdown=drain,
        timeout_keep_alive=30,
    )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
    server = uvicorn.Server(config)
    gateway.services.draining = lambda: server.should_exit
    server.run(sockets=[sock])


#: One line a message on stderr. Nothing of a request's text is ever logged here.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "ratchet": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


if __name__ == "__main__":
    sys.exit(main())
