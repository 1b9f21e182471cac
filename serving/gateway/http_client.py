"""HTTP/1.1 to upstreams: connections by origin, kept while they are used; see http_connection.

aiohttp's client makes some twenty objects a request and arms timers for it: 135 us where this one
takes 25, side by side on a busy machine. This one writes a head that was made once for each address
and parses with llhttp, as aiohttp does. A connection is kept for KEEP_SECONDS, under vLLM's 5 s, so
that a request does not go into one that is being closed. Nothing is followed, retried, or kept
besides. Proxies and cookies do not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable

from serving.gateway.http_connection import Answer, ConnectError, Connection, Origin

KEEP_SECONDS = 3.0


class Client:
    """Connections to every upstream, kept by origin. Use as ``async with``."""

    def __init__(self) -> None:
        self._idle: dict[Origin, list[Connection]] = {}
        self._used: set[Connection] = set()
        self._tls: ssl.SSLContext | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.opened = 0  # connections so far

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    @property
    def idle(self) -> int:
        """Kept connections."""
        return sum(map(len, self._idle.values()))

    @property
    def used(self) -> int:
        """Connections whose answer has not ended."""
        return len(self._used)

    def close(self) -> None:
        """Close every connection, those in use too."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in [*self._used, *(one for kept in self._idle.values() for one in kept)]:
            connection.close()

    async def ask(
        self,
        origin: Origin,
        head: bytes,
        body: bytes = b"",
        *,
        connect: float,
        until: float,
        fresh: bool = False,
    ) -> Answer:
        """The answer to a request, its head here.

        Args:
            head: from the method to the empty line.
            connect: seconds for a new connection, TLS included.
            until: ``loop.time()`` at which waiting ends, also for a name's address.
            fresh: on a new connection.

        Raises ConnectError, BrokenError, NoHttpError or TimeoutError. Leaving (cancellation) closes
        the connection.
        """
        connection = None if fresh else self._take(origin)
        if connection is None:
            connection = await self._connect(origin, connect, until)
        self._used.add(connection)
        answer = connection.send(head, body)
        try:
            await answer.head(until)
        except BaseException:
            answer.close()
            raise
        return answer

    # -- the pool -------------------------------------------------------------------------------

    def _take(self, origin: Origin) -> Connection | None:
        """The connection that was used last."""
        kept = self._idle.get(origin)
        while kept:
            connection = kept.pop()
            if connection.usable:
                return connection
        return None

    def give_back(self, connection: Connection) -> None:
        """A connection is free. One that nobody takes for KEEP_SECONDS is closed."""
        self._used.discard(connection)
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEP_SECONDS, self._sweep)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._used.discard(connection)
        kept = self._idle.get(connection.origin)
        if kept is not None:
            with contextlib.suppress(ValueError):
                kept.remove(connection)

    def _sweep(self) -> None:
        """Close what was not used for KEEP_SECONDS; look again when the next one is due."""
        loop = asyncio.get_running_loop()
        self._sweeper, due = None, loop.time() - KEEP_SECONDS
        for connection in [c for kept in self._idle.values() for c in kept]:
            if connection.idle_since <= due:
                connection.close()
        self._idle = {origin: kept for origin, kept in self._idle.items() if kept}
        oldest = min((c.idle_since for kept in self._idle.values() for c in kept), default=None)
        if oldest is not None:
            self._sweeper = loop.call_at(oldest + KEEP_SECONDS, self._sweep)

    # -- new connections ------------------------------------------------------------------------

    async def _connect(self, origin: Origin, seconds: float, until: float) -> Connection:
        """A new connection to the first address that takes one; each gets its share of the time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(until):
            addresses = await _addresses(origin)
        ends = min(loop.time() + seconds, until)
        problem = "no connection in time"
        for number, address in enumerate(addresses):
            share = (ends - loop.time()) / (len(addresses) - number)
            try:
                async with asyncio.timeout(max(share, 0.0)):
                    _, found = await loop.create_connection(
                        self._factory(origin),
                        address,
                        origin.port,
                        ssl=self._context() if origin.tls else None,
                        server_hostname=origin.host if origin.tls else None,
                    )
            except TimeoutError:
                problem = "no connection in time"
            except OSError as error:  # TLS errors are such
                problem = error.strerror or "no connection"
            else:
                self.opened += 1
                return found
        raise ConnectError(problem)

    def _factory(self, origin: Origin) -> Callable[[], Connection]:
        return lambda: Connection(self, origin)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


async def _addresses(origin: Origin) -> list[str]:
    """IP addresses of an origin, in the order in which to try them. Raises ConnectError."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(origin.host)
        return [origin.host]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectError(error.strerror or "its name has no address") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
