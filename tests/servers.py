"""Real Postgres and Redis servers that a test owns: start, kill in the middle, start again.

A test module imports the fixtures it needs. By POSTGRES_URL or REDIS_URL a server of one's own may
serve the contract tests; those that kill a server always start one. Without a binary a test skips,
which is a failure under CI=true.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import free_port

READY_SECONDS = 30.0
#: Read before tests hide them from the code.
POSTGRES_URL, REDIS_URL = os.environ.get("POSTGRES_URL"), os.environ.get("REDIS_URL")


class Server:
    """One server process on a port of its own; its data outlive ``kill``."""

    def __init__(self) -> None:
        self.port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="ratchet-server-"))
        self.process: subprocess.Popen[bytes] | None = None
        self.prepare()
        self.start()

    url = ""

    def prepare(self) -> None: ...

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
                user="postgres" if self._lowered() else None,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers():
            assert self.process.poll() is None, (self.home / "log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)

    def _lowered(self) -> bool:
        return False

    def kill(self) -> None:
        """As a crash: SIGKILL for the whole process group."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)


class RedisServer(Server):
    @property
    def url(self) -> str:  # type: ignore[override]
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        return [
            *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
            # Written before it is answered, and not synced: it survives SIGKILL, not the machine.
            *("--appendonly", "yes", "--appendfsync", "no", "--dir", str(self.home)),
        ]

    def answers(self) -> bool:
        import redis

        try:
            with redis.Redis(port=self.port, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class PostgresServer(Server):
    @property
    def url(self) -> str:  # type: ignore[override]
        return f"postgresql://ratchet@127.0.0.1:{self.port}/postgres"

    def _lowered(self) -> bool:
        return os.geteuid() == 0  # Postgres refuses to run as root

    def prepare(self) -> None:
        if self._lowered():
            shutil.chown(self.home, "postgres")
        subprocess.run(
            ["initdb", "-D", str(self.home / "data"), "-U", "ratchet", "-A", "trust", "-N"],
            check=True,
            capture_output=True,
            cwd=self.home,
            user="postgres" if self._lowered() else None,
        )

    def command(self) -> list[str]:
        return [
            *("postgres", "-D", str(self.home / "data"), "-p", str(self.port), "-F"),
            *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.home}"),
        ]

    def answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.url, connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True


def _own(kind: Callable[[], Server], binary: str) -> Iterator[Server]:
    if shutil.which(binary) is None:
        pytest.skip(f"{binary} is not on this machine")
    server = kind()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Server]:
    """A Redis of this module's own; a test that kills it starts it again."""
    yield from _own(RedisServer, "redis-server")


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[Server]:
    """A Postgres of this module's own (initdb takes 1 to 2 s); as redis_server."""
    yield from _own(PostgresServer, "initdb")


@pytest.fixture(scope="module")
def redis_url(request: pytest.FixtureRequest) -> str:
    return REDIS_URL or str(request.getfixturevalue("redis_server").url)


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database of the test's own, also on a server that somebody else uses."""
    import psycopg2

    server = POSTGRES_URL or str(request.getfixturevalue("postgres_server").url)
    name = f"ratchet_test_{secrets.token_hex(6)}"
    connection = psycopg2.connect(server)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    connection.close()
