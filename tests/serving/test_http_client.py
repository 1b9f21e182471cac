"""The HTTP client against servers that do all that HTTP/1.1 allows, and some that it does not."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving.gateway import http_client, http_connection
from serving.gateway.http_client import Client
from serving.gateway.http_connection import BrokenError, ConnectError, NoHttpError, Origin

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request with the next of ``answers``; a callable talks itself.

    Attributes:
        opened: connections so far.
        seen: what came, by request.
    """

    def __init__(self, *answers: bytes | Talk) -> None:
        self.answers = list(answers)
        self.opened, self.seen = 0, list[bytes]()
        self.ended = asyncio.Event()  # a client has left

    async def start(self, **more: Any) -> Origin:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, **more)
        port = self._server.sockets[0].getsockname()[1]
        return Origin("localhost" if more else "127.0.0.1", port, bool(more))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                self.seen.append(head)
                answer = self.answers.pop(0)
                if callable(answer):
                    await answer(reader, writer)
                else:
                    writer.write(answer)
                    await writer.drain()
            await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended.set()
            writer.close()


def run(
    server: Callable[[], Server], use: Callable[[Server, Origin, Client], Awaitable[Any]]
) -> Any:
    async def main() -> Any:
        made = server()
        origin = await made.start()
        async with asyncio.timeout(20), Client() as client:
            return await use(made, origin, client)

    return asyncio.run(main())


async def ask(client: Client, origin: Origin, body: bytes = b"", seconds: float = 10) -> Any:
    """Status and body."""
    until = asyncio.get_running_loop().time() + seconds
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer = await client.ask(origin, head, body, connect=5, until=until)
    found = b""
    try:
        while data := await answer.read(until):
            found += data
    finally:
        answer.close()
    return answer.status, found


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ZIPPED = gzip.compress(b"hi")
WHOLE = {
    "length": OK,
    "chunks": CHUNKED + chunked(b"h", b"i"),
    "trailers": CHUNKED + b"2\r\nhi\r\n0\r\nx-late: 1\r\n\r\n",
    "informational": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nx: y\r\n\r\n" + OK,
    "gzip": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b"
    % (len(ZIPPED), ZIPPED),
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_whole_answer_leaves_its_connection_to_the_next(form: str) -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        assert [await ask(client, origin) for _ in range(2)] == [(200, b"hi")] * 2
        assert (server.opened, client.opened, client.idle, client.used) == (1, 1, 1, 0)

    run(lambda: Server(WHOLE[form], WHOLE[form]), use)


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nhi")
    writer.close()


LAST: dict[str, bytes | Talk] = {
    "until the end": _close,
    "connection: close": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    "a second answer": OK + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother",
    "a second head": OK + b"HTTP/1.1 200 OK\r\n",
    "noise": OK + b"noise",
}


@pytest.mark.parametrize("form", LAST)
def test_no_request_goes_into_a_connection_that_may_not_have_its_answer(form: str) -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        assert [await ask(client, origin) for _ in range(2)] == [(200, b"hi")] * 2
        assert server.opened == 2

    run(lambda: Server(LAST[form], OK), use)


def test_what_comes_unasked_ends_a_kept_connection() -> None:
    async def later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await told.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")

    async def use(server: Server, origin: Origin, client: Client) -> None:
        await ask(client, origin)
        assert client.idle == 1
        told.set()
        while client.idle:
            await asyncio.sleep(0.001)
        assert await ask(client, origin) == (200, b"hi") and server.opened == 2

    told = asyncio.Event()
    run(lambda: Server(later, OK), use)


def test_an_answer_before_the_request_was_read_ends_the_connection() -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n"
        server.answers = [refusal, OK]
        assert await ask(client, origin, bytes(64 << 20)) == (413, b"")
        assert (client.idle, client.used) == (0, 0)
        assert await ask(client, origin) == (200, b"hi") and server.opened == 2

    run(Server, use)


WRONG: dict[str, tuple[bytes, type[Exception]]] = {
    "no HTTP": (b"220 mail.example.com ESMTP\r\n", NoHttpError),
    "endless head": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, NoHttpError),
    "both lengths": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
                     NoHttpError),
    "another protocol": (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
                         NoHttpError),
    "unknown coding": (b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 1\r\n\r\nx",
                       NoHttpError),
    "no gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nhi",
                NoHttpError),
    "bad chunk": (CHUNKED + b"2\r\nhi\r\nzz\r\n", NoHttpError),
    "half a head": (b"HTTP/1.1 200 OK\r\ncontent-le", BrokenError),
    "cut": (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", BrokenError),
    "cut chunks": (CHUNKED + b"5\r\nhi", BrokenError),
}  # fmt: skip


@pytest.mark.parametrize("form", WRONG)
def test_what_is_no_whole_answer_raises_and_closes(form: str) -> None:
    data, expected = WRONG[form]

    async def use(server: Server, origin: Origin, client: Client) -> None:
        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            writer.close()

        server.answers = [once]
        with pytest.raises(expected) as error:
            await ask(client, origin)
        assert not getattr(error.value, "stale", False)
        assert (client.idle, client.used) == (0, 0)

    run(Server, use)


def test_bytes_that_unpack_to_far_more_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "MAX_UNPACKED", 1000)
    bomb = gzip.compress(bytes(1 << 20))
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)

    async def use(server: Server, origin: Origin, client: Client) -> None:
        with pytest.raises(NoHttpError, match="far more"):
            await ask(client, origin)

    run(lambda: Server(head + bomb), use)


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def _half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi")
    await reader.read()


@pytest.mark.parametrize("talk", [_hang, _half])
def test_a_wait_ends_at_its_time_whatever_was_waited_for_before(talk: Talk) -> None:
    """The connection's one timer was armed for the patient request before."""

    async def use(server: Server, origin: Origin, client: Client) -> None:
        await ask(client, origin, seconds=1000)
        time = asyncio.get_running_loop().time
        began = time()
        with pytest.raises(TimeoutError):
            await ask(client, origin, seconds=0.05)
        assert 0.04 < time() - began < 5
        await server.ended.wait()  # the connection is closed
        assert (client.idle, client.used) == (0, 0)

    run(lambda: Server(OK, talk), use)


def test_a_timer_that_fires_early_is_set_anew() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)  # past the first request's time
        writer.write(OK)

    async def use(server: Server, origin: Origin, client: Client) -> None:
        await ask(client, origin, seconds=0.05)
        assert await ask(client, origin, seconds=10) == (200, b"hi")
        with pytest.raises(TimeoutError):
            await ask(client, origin, seconds=0.05)

    run(lambda: Server(OK, slow, _hang), use)


def test_leaving_closes_the_connection() -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        call = asyncio.ensure_future(ask(client, origin))
        while not server.seen:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await server.ended.wait()
        assert (client.idle, client.used) == (0, 0)

    run(lambda: Server(_hang), use)


def test_a_slow_reader_holds_its_server_back() -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (1 << 26))
        for _ in range(1 << 10):
            writer.write(bytes(1 << 16))
            await writer.drain()
            written += 1 << 16

    async def use(server: Server, origin: Origin, client: Client) -> None:
        until = asyncio.get_running_loop().time() + 15
        head = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        answer = await client.ask(origin, head, connect=5, until=until)
        before = -1
        while before != written:  # until nothing moves any more
            before = written
            await asyncio.sleep(0.05)
        assert written < 1 << 25  # buffers of the kernel are large, and no more than those
        size = 0
        while data := await answer.read(until):
            size += len(data)
        assert size == 1 << 26 and client.idle == 1

    run(lambda: Server(flood), use)


def test_connections_are_kept_for_a_while_and_closed_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_client, "KEEP_SECONDS", 0.05)

    async def use(server: Server, origin: Origin, client: Client) -> None:
        await ask(client, origin)
        while client.idle:
            await asyncio.sleep(0.005)
        await server.ended.wait()
        server.ended.clear()
        await ask(client, origin)
        assert server.opened == 2
        client.close()
        await server.ended.wait()

    run(lambda: Server(OK, OK), use)


def test_a_kept_connection_that_was_closed_is_stale_and_a_new_one_is_not() -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server.answers = [OK, leave, leave]
        await ask(client, origin)
        for stale in (True, False):
            with pytest.raises(BrokenError) as error:
                await ask(client, origin)
            assert error.value.stale == stale

    run(Server, use)


def test_nobody_there_and_no_such_name() -> None:
    async def use(server: Server, origin: Origin, client: Client) -> None:
        for wrong in (Origin("127.0.0.1", 1), Origin("no-such-name.invalid", 80)):
            with pytest.raises(ConnectError):
                await ask(client, wrong)

    run(Server, use)


def certificate(folder: Path) -> Path:
    """A certificate for localhost and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


def test_tls_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate(tmp_path)

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        server = Server(OK, OK)
        origin = await server.start(ssl=context)
        async with asyncio.timeout(20):
            async with Client() as client:
                with pytest.raises(ConnectError):  # nobody signed it
                    await ask(client, origin)
            monkeypatch.setenv("SSL_CERT_FILE", str(path))
            async with Client() as client:
                with pytest.raises(ConnectError):  # it is not for this name
                    await ask(client, Origin("127.0.0.1", origin.port, True))
                assert [await ask(client, origin) for _ in range(2)] == [(200, b"hi")] * 2
                assert client.opened == 1

    asyncio.run(main())
