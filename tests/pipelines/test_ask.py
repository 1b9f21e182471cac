from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from contracts.errors import ServiceError
from contracts.settings import Settings
from pipelines import ask
from tests.conftest import free_port


class Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = b'{"error": {"message": "no release is served", "code": "not_ready"}}'
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def refusing() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_gateway_says_how_to_start_one() -> None:
    settings = Settings.from_env({"RATCHET_GATEWAY_PORT": str(free_port())})
    with pytest.raises(ServiceError, match="make up"):
        ask.ask("?", settings)


def test_the_gateways_own_words_are_shown(refusing: int) -> None:
    settings = Settings.from_env({"RATCHET_GATEWAY_PORT": str(refusing)})
    with pytest.raises(ServiceError, match="503: no release is served"):
        ask.ask("?", settings)


def test_an_answer_as_a_terminal_shows_it() -> None:
    citation = {"n": 1, "path": "gates.md", "heading": "Verdicts", "start": 3, "end": 9}
    text = ask.render(
        {"answer": "So. [1]", "citations": [citation], "response_id": "resp-1", "release": "abc"}
    )
    assert "[1] gates.md > Verdicts  (3-9)" in text
    assert "ratchet trace resp-1" in text
