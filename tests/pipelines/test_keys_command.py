"""`ratchet keys`: made, listed, rotated, revoked; garbage is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.errors import InputError, NotFoundError, RatchetError
from contracts.settings import Settings
from pipelines import cli


def ratchet(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["keys", *words])
    if result.exception is not None:
        raise result.exception
    return result.output


def as_json(*words: str) -> Any:
    return json.loads(ratchet(*words, "--json"))


def test_the_life_of_a_key(settings: Settings) -> None:
    assert "there is no key" in ratchet("list")
    made = as_json(
        *("create", "--tenant", "acme", "--name", "the shop", "--model", "fast"),
        *("--model", "smart", "--release", "stable", "--expires", "90d", "--guard", "strict"),
        *("--feature", "search", "--requests-per-minute", "60", "--tokens-per-minute", "9000"),
        *("--concurrent", "4", "--max-prompt-tokens", "2000", "--session-tokens", "50000"),
        *("--session-seconds", "300", "--spend-day", "2.5", "--spend-month", "40"),
    )
    key = made["key"]
    assert made["token"].startswith(f"rk_{key['id']}.")
    assert key["models"] == ["fast", "smart"]
    assert key["state"] == "active"
    assert 89 < (key["expires"] - key["created"]) / 86_400 < 91
    assert key["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": 9000,
        "concurrent": 4,
        "max_prompt_tokens": 2000,
        "session_tokens": 50000,
        "session_seconds": 300,
        "spend_day": 2.5,
        "spend_month": 40.0,
    }
    shown = ratchet("list")
    assert key["id"] in shown
    assert made["token"].partition(".")[2] not in shown + ratchet("list", "--json")
    assert "there is no key" in ratchet("list", "--tenant", "other")

    rotated = as_json("rotate", key["id"], "--grace", "7d")
    assert rotated["token"] != made["token"]
    assert rotated["key"] == key
    assert "revoked" in ratchet("revoke", rotated["token"])  # a whole token names its key
    assert as_json("list")[0]["state"] == "revoked"


def test_a_token_is_shown_once_and_alone_on_its_line(settings: Settings) -> None:
    first, *rest = ratchet("create", "--tenant", "acme", "--name", "x").splitlines()
    assert first.startswith("rk_")
    assert first.partition(".")[2] not in "\n".join(rest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "--tenant", "A b", "--name", "x"], "tenant"),
        (["create", "--tenant", "a", "--name", ""], "name"),
        (["create", "--tenant", "a", "--name", "x", "--expires", "soon"], "soon"),
        (["create", "--tenant", "a", "--name", "x", "--expires", "2001-01-01"], "expired"),
        (["create", "--tenant", "a", "--name", "x", "--expires", "99999999d"], "expires"),
        (["create", "--tenant", "a", "--name", "x", "--spend-day", "-1"], "spend_day"),
        (["create", "--tenant", "a", "--name", "x", "--spend-day", "nan"], "spend_day"),
        (["create", "--tenant", "a", "--name", "x", "--concurrent", "0"], "concurrent"),
        (["create", "--tenant", "a", "--name", "x", "--model", "a b"], "models"),
        (["rotate", "ffffffffffff"], "no key"),
        (["rotate", "ffffffffffff", "--grace", "1 week"], "1 week"),
        (["rotate", "ffffffffffff", "--grace", "90d"], "grace"),
        (["revoke", "' OR 1=1"], "no key"),
    ],
)
def test_garbage_is_refused(settings: Settings, words: list[str], said: str) -> None:
    with pytest.raises(RatchetError, match=said) as caught:
        ratchet(*words)
    assert isinstance(caught.value, InputError | NotFoundError)
    assert "there is no key" in ratchet("list")


def test_a_token_that_is_not_there_is_not_repeated(settings: Settings) -> None:
    with pytest.raises(NotFoundError) as caught:
        ratchet("revoke", "rk_ffffffffffff.secretsecret")
    assert "secretsecret" not in str(caught.value)
