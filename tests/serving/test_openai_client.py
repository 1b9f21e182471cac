"""The official client against the gateway, unchanged: a stranger's idea of the API."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.conftest import Running
from tests.serving.fake_engine import ANSWER, FakeEngine

QUESTION: Any = [{"role": "user", "content": "What is fact 1?"}]


@pytest.fixture
def client(gateway: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


def test_json(client: openai.OpenAI, release: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model="stable", messages=QUESTION)
    answer = raw.parse()
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 31
    assert raw.headers["x-ratchet-release"] == release
    assert answer.id == raw.headers["x-ratchet-response-id"]
    assert answer.model_extra and answer.model_extra["citations"][0]["path"] == "page1.md"


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="ratchet", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 20
    finished = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert finished.model_extra and finished.model_extra["citations"][0]["n"] == 1


def test_stream_helper(client: openai.OpenAI) -> None:
    """The client's accumulating helper merges our frames into one completion."""
    with client.chat.completions.stream(model="stable", messages=QUESTION) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stable", "ratchet"]
    assert client.models.retrieve("stable").owned_by == "ratchet"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="stable", messages=QUESTION, n=3)
    assert refused.value.code == "unsupported_parameter" and refused.value.param == "n"
    fault: Any = [{"role": "user", "content": "fault:error-mid"}]
    with pytest.raises(openai.APIError, match="failed while answering"):
        list(client.chat.completions.create(model="stable", messages=fault, stream=True))


def test_the_clients_retry_is_answered(gateway: Running, engine: FakeEngine) -> None:
    """A queue-full 503 is retried by the client and told with Retry-After."""
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=1)
    fault: Any = [{"role": "user", "content": "fault:503"}]
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="stable", messages=fault)
    assert refused.value.code == "engine_overloaded"
    assert len(engine.bodies) == 2
