"""Serve the private pages: ``python -m serving.private [--port N]``.

Listens on RATCHET_PRIVATE_HOST, the loopback address unless it says otherwise: there is no login.
"""

from __future__ import annotations

import argparse

import uvicorn

from contracts import offline
from contracts.settings import Settings
from serving.private.app import create_app


def main() -> None:
    offline.apply()
    settings = Settings.from_env()
    parser = argparse.ArgumentParser(prog="python -m serving.private", description=__doc__)
    parser.add_argument("--port", type=int, default=settings.private_port)
    given = parser.parse_args()
    uvicorn.run(
        create_app(settings),
        host=settings.private_host,
        port=given.port,
        log_level="warning",
        access_log=False,  # names and reasons are people's words
        server_header=False,
    )


if __name__ == "__main__":
    main()
