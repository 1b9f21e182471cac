"""What a gateway's process has before it has anything else: its socket and its log."""

from __future__ import annotations

import socket

from contracts.errors import ServiceError

#: One line a message on stderr. Nothing of a request's text is ever logged.
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


def address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
