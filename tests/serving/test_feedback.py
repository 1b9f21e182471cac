"""POST /v1/feedback: only about the caller's own responses, kept before it is acknowledged."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from contracts.errors import InputError
from contracts.records import FeedbackRecord
from contracts.settings import Settings
from resources import feedback, requests
from resources.keys import KeyStore
from resources.request_writer import DayWriter
from resources.requests import new_response_id
from serving.gateway.auth import Auth, Authenticator
from serving.gateway.feedback import WORDS, FeedbackEndpoint
from serving.gateway.metrics import Metrics
from tests.resources.test_requests import row

SECRET = "sk-proj-" + "Qz7Wx2Lm9Kp4Rt8Vb3Nc6Yd1Hf5Jg0Sa"
DAY = f"{datetime.now(UTC):%Y-%m-%d}"
OURS, THEIRS = new_response_id(datetime.now(UTC)), new_response_id(datetime.now(UTC))


def called(
    endpoint: FeedbackEndpoint, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """The status and the body of one call, over ASGI."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/feedback", "headers": pairs}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(endpoint(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


class Caller:
    """Speaks ASGI to the endpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        keys = KeyStore.open(settings)
        self.tokens = {
            name: keys.create(tenant, name).token
            for name, tenant in (("one", "acme"), ("two", "acme"), ("stranger", "other"))
        }
        self.authenticator = Authenticator(keys, Auth(required=True), self.metrics)
        self.authenticator.refresh()
        self.endpoint = FeedbackEndpoint(
            self.authenticator, feedback.folder(settings), settings.requests_dir, self.metrics
        )

    def __call__(self, body: Any, who: str = "one", **headers: str) -> tuple[int, dict[str, Any]]:
        given = {"authorization": f"Bearer {self.tokens.get(who, who)}", **headers}
        return called(self.endpoint, body, given)


@pytest.fixture
def caller(settings: Settings) -> Iterator[Caller]:
    writer = DayWriter(settings.requests_dir)
    writer.append([
        row(1, DAY, response_id=OURS, tenant="acme"),
        row(2, DAY, response_id=THEIRS, tenant="other"),
    ])  # fmt: skip
    found = Caller(settings)
    yield found
    writer.close()
    found.authenticator.close()


def test_the_last_word_of_a_key_counts_and_all_are_kept(caller: Caller) -> None:
    assert caller({"response_id": OURS, "thumb": "down", "comment": "Größe fehlt"}) == (
        200, {"object": "feedback", "response_id": OURS})  # fmt: skip
    assert caller({"response_id": OURS, "thumb": "up"})[0] == 200
    assert caller({"response_id": OURS, "edit": "Better."}, "two")[0] == 200
    words = feedback.history(caller.settings, DAY)
    assert [(word.thumb, word.comment, word.edit) for word in words] == [
        ("down", "Größe fehlt", ""), ("up", "", ""), (None, "", "Better.")]  # fmt: skip
    assert {word.tenant for word in words} == {"acme"}
    assert [word.thumb for word in feedback.last(caller.settings, DAY)] == ["up", None]
    path = feedback.folder(caller.settings) / f"{DAY}.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    name = "ratchet_gateway_feedback_total"
    assert caller.metrics.registry.get_sample_value(name, {"thumb": "down"}) == 1


def test_an_id_of_nobody_and_one_of_somebody_else_get_one_answer(caller: Caller) -> None:
    unknown = new_response_id(datetime.now(UTC))
    answers = []
    for response_id in (THEIRS, unknown, "resp-x", "../../etc/passwd", "resp-20260101-" + "0" * 24):
        status, body = caller({"response_id": response_id, "thumb": "up"})
        body["error"].pop("request_id")
        answers.append((status, body))
    assert answers[0][0] == 404 and all(answer == answers[0] for answer in answers)
    assert caller({"response_id": OURS, "thumb": "up"}, "stranger")[0] == 404
    assert caller({"response_id": THEIRS, "thumb": "up"}, "stranger")[0] == 200
    assert caller({"response_id": OURS, "thumb": "up"}, "nobody")[0] == 401
    assert not list(feedback.folder(caller.settings).glob("*passwd*"))


def test_a_response_counts_from_the_moment_it_went_out(caller: Caller) -> None:
    fresh = new_response_id(datetime.now(UTC))
    caller.endpoint.note(fresh, "acme")  # its record may still be in the queue
    assert caller({"response_id": fresh, "thumb": "up"})[0] == 200
    assert caller({"response_id": fresh, "thumb": "up"}, "stranger")[0] == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b'{"response_id": "a", "response_id": "b", "thumb": "up"}', None),
        ({"response_id": OURS}, None),
        ({"response_id": OURS, "comment": " \n"}, None),
        ({"thumb": "up"}, "response_id"),
        ({"response_id": 7, "thumb": "up"}, "response_id"),
        ({"response_id": OURS, "thumb": "sideways " + SECRET}, "thumb"),
        ({"response_id": OURS, "thumb": True}, "thumb"),
        ({"response_id": OURS, "edit": "x" * 20_001}, "edit"),
        ({"response_id": OURS, "comment": "x" * 4_001}, "comment"),
        ({"response_id": OURS, "thumb": "up", SECRET: 1}, None),
        (b'{"response_id": "%s", "comment": "\\ud800"}' % OURS.encode(), "comment"),
        (b"x" * 200_000, None),
    ],
    # Not from the values: they hold what differs between two workers.
    ids=[f"case{n}" for n in range(13)],
)
def test_what_is_malformed_is_refused_and_not_repeated(
    caller: Caller, body: Any, param: str | None
) -> None:
    status, answer = caller(body)
    assert status in (400, 413)
    assert answer["error"]["param"] == param
    assert SECRET not in json.dumps(answer)
    assert feedback.history(caller.settings, DAY) == []


def test_nothing_that_people_must_not_read_is_kept(caller: Caller) -> None:
    text = f"Ask jane.roe@corp-mail.com, key {SECRET}"
    assert caller({"response_id": OURS, "comment": text, "edit": text})[0] == 200
    (word,) = feedback.history(caller.settings, DAY)
    assert word.comment == word.edit == "Ask XXXX.XXX@XXXX-XXXX.XXX, key XX-XXXX-" + "X" * 32


def test_a_key_cannot_fill_the_disk_with_one_response(caller: Caller) -> None:
    answers = [caller({"response_id": OURS, "thumb": "up"})[0] for _ in range(WORDS + 3)]
    assert answers == [200] * WORDS + [429] * 3
    assert caller({"response_id": OURS, "thumb": "up"}, "two")[0] == 200


def test_a_disk_that_refuses_is_told_and_leaves_no_half_line(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert caller({"response_id": OURS, "thumb": "up"})[0] == 200
    real = os.write
    monkeypatch.setattr("resources.feedback.os.write", lambda f, d: real(f, d[: len(d) // 2]))
    assert caller({"response_id": OURS, "thumb": "down"})[0] == 500
    monkeypatch.undo()
    assert [word.thumb for word in feedback.history(caller.settings, DAY)] == ["up"]


def test_a_damaged_line_is_named(caller: Caller) -> None:
    caller({"response_id": OURS, "thumb": "up"})
    path = feedback.folder(caller.settings) / f"{DAY}.jsonl"
    with path.open("a") as stream:
        stream.write("{torn\n")
    with pytest.raises(InputError) as error:
        feedback.history(caller.settings, DAY)
    assert error.value.offenders == ["line 2"]
    stray = {"response_id": "../x", "tenant": "t", "key_id": "k", "time": "", "thumb": "up"}
    with pytest.raises(InputError):
        feedback.append(
            path.parent, FeedbackRecord.model_validate(stray | {"edit": "", "comment": ""})
        )


def test_the_owner_of_a_response_is_found_before_and_after_it_was_rolled(
    settings: Settings,
) -> None:
    writer = DayWriter(settings.requests_dir)
    writer.append([row(1, DAY, response_id=OURS, tenant="acme")])
    for _ in range(2):
        assert requests.owner(settings.requests_dir, OURS) == "acme"
        assert requests.owner(settings.requests_dir, THEIRS) is None
        writer.close()
