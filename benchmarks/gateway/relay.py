"""The floor: the least that a Python relay can be, uvicorn in front and aiohttp behind.

It reads the body, posts it, and passes on what comes. No key, no check, no log, no deadline. What a
gateway in Python costs on top of this is what its features cost.

    python -m benchmarks.gateway.relay URL     prints {"url": ...} and serves until SIGTERM
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

import aiohttp
import uvicorn


class Relay:
    """One ASGI application for every path."""

    def __init__(self, upstream: str) -> None:
        self._url = upstream + "/v1/chat/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
            )
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            kind = answer.headers["content-type"].encode()
            start = {"type": "http.response.start", "status": answer.status}
            if not kind.startswith(b"text/event-stream"):
                data = await answer.read()
                length = (b"content-length", str(len(data)).encode())
                await send({**start, "headers": [(b"content-type", kind), length]})
                await send({"type": "http.response.body", "body": data})
                return
            await send({**start, "headers": [(b"content-type", kind)]})
            while data := await answer.content.readany():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def main() -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        Relay(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
    )
    print(json.dumps({"url": f"http://127.0.0.1:{sock.getsockname()[1]}"}), flush=True)
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
