"""Who asks: right tokens, wrong tokens, and a store of keys that goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from contracts.settings import Settings
from resources.keys import KeyStore
from serving.gateway import auth as module
from serving.gateway.auth import (
    ANONYMOUS,
    REFRESH_SECONDS,
    REVOCATION_SECONDS,
    Auth,
    Authenticator,
    Principal,
)
from serving.gateway.envelope import ApiError
from serving.gateway.metrics import Metrics
from tests.servers import Server, postgres_server  # noqa: F401
from tests.serving.conftest import until

Start = Callable[..., Authenticator]


@pytest.fixture
def store(settings: Settings) -> KeyStore:
    return KeyStore.open(settings)


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Authenticators, each with a store and a thread of its own, as in workers."""
    found = []

    def build(
        at: Settings = settings, wait: bool = True, every: float = REFRESH_SECONDS, **more: Any
    ) -> Authenticator:
        config = Auth(**{"required": True, **more})
        one = Authenticator(KeyStore.open(at), config, Metrics(), refresh_seconds=every)
        found.append(one)
        one.start()
        if wait:
            until(lambda: one.problem is None)
        return one

    yield build
    for one in found:
        one.close()


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + token.encode())]


def asked(one: Authenticator, token: str) -> Principal | str:
    """The principal, or the code of the error."""
    try:
        return one.authenticate(bearer(token))
    except ApiError as error:
        return error.code


def test_both_headers_name_the_key(store: KeyStore, start: Start) -> None:
    issued = store.create("acme", "x")
    one = start()
    token = issued.token.encode()
    for headers in (
        [(b"authorization", b"Bearer " + token)],
        [(b"authorization", b"bearer  " + token + b" ")],
        [(b"x-api-key", token)],
        [(b"authorization", b"Bearer " + token), (b"x-api-key", token)],
    ):
        found = one.authenticate(headers)
        assert (found.tenant, found.key_id, found.key) == ("acme", issued.key.id, issued.key)


def test_one_answer_for_everything_that_is_wrong(store: KeyStore, start: Start) -> None:
    good, revoked = store.create("acme", "x"), store.create("acme", "y")
    expired = store.create("acme", "z", expires=time.time() + 0.2)
    store.revoke(revoked.key.id)
    one = start()
    until(lambda: time.time() > (expired.key.expires or 0))
    tokens = [
        revoked.token,
        expired.token,
        f"rk_ffffffffffff.{good.token.partition('.')[2]}",
        good.token[:-1] + ("A" if good.token[-1] != "A" else "B"),
        good.token[:-1],
        good.token + "A",
        "RK" + good.token[2:],
        good.token.replace(".", ""),
        f"rk_{revoked.key.id}.{good.token.partition('.')[2]}",
        "",
        "rk_",
        "rk_.",
        "x" * 100_000,
        "' OR 1=1 --",
    ]
    headers = [bearer(token) for token in tokens]
    raw = good.token.encode()
    headers += [
        [(b"authorization", b"Basic " + raw)],
        [(b"authorization", raw)],
        [(b"authorization", b"Bearer " + raw), (b"x-api-key", b"another")],
        [(b"authorization", b"Bearer " + raw), (b"authorization", b"Bearer x")],
        [(b"authorization", b"Bearer \xff\xfe\x00")],
        [(b"host", b"x")],
        [],
    ]
    said = set()
    for found in headers:
        with pytest.raises(ApiError) as caught:
            one.authenticate(found)
        error = caught.value
        said.add((error.code, error.message, error.status, tuple(error.all_headers().items())))
    assert len(said) == 1
    assert said.pop()[0] == "invalid_api_key"
    assert asked(one, good.token) != "invalid_api_key"


def test_every_token_costs_the_same_work(
    store: KeyStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, revoked = store.create("acme", "x"), store.create("acme", "y")
    store.revoke(revoked.key.id)
    one = start()
    work: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*values: Any) -> Any:
            work.append(name)
            return function(*values)

        return call

    monkeypatch.setattr(module, "digest", counted("hmac", module.digest))
    monkeypatch.setattr(module, "compare_digest", counted("compare", module.compare_digest))
    for token in (good.token, revoked.token, "rk_ffffffffffff.x", "", "x" * 10_000):
        work.clear()
        asked(one, token)
        assert work == ["hmac", "compare", "compare"]


def test_a_revocation_reaches_every_worker_in_time(store: KeyStore, start: Start) -> None:
    issued, other = store.create("acme", "x"), store.create("acme", "y")
    workers = [start(), start()]
    assert all(isinstance(asked(one, issued.token), Principal) for one in workers)
    store.revoke(issued.key.id)
    revoked = time.monotonic()
    until(lambda: all(asked(one, issued.token) == "invalid_api_key" for one in workers))
    assert time.monotonic() - revoked <= REVOCATION_SECONDS
    assert all(isinstance(asked(one, other.token), Principal) for one in workers)


def test_a_rotation_ends_the_old_token_after_its_grace(store: KeyStore, start: Start) -> None:
    first = store.create("acme", "x")
    one = start()
    one.refresh()
    second = store.rotate(first.key.id, grace=0.5)
    one.refresh()
    assert isinstance(asked(one, first.token), Principal)
    assert isinstance(asked(one, second.token), Principal)
    until(lambda: asked(one, first.token) == "invalid_api_key")
    third = store.rotate(first.key.id)
    one.refresh()
    assert asked(one, second.token) == "invalid_api_key"
    assert isinstance(asked(one, third.token), Principal)


def test_without_keys_required_a_wrong_token_is_still_wrong(store: KeyStore, start: Start) -> None:
    issued = store.create("acme", "x")
    one = start(required=False)
    assert one.authenticate([(b"host", b"x")]) is ANONYMOUS
    assert ANONYMOUS.tenant == "local"
    assert asked(one, "rk_ffffffffffff.x") == "invalid_api_key"
    found = asked(one, issued.token)
    assert isinstance(found, Principal)
    assert found.tenant == "acme"


def test_postgres_is_killed_and_started_again(
    settings: Settings,
    start: Start,
    postgres_server: Server,  # noqa: F811
) -> None:
    at = replace(settings, postgres_url=postgres_server.url)
    store = KeyStore.open(at)
    issued = store.create("acme", "x")
    patient, strict = (start(at, every=0.1, outage_seconds=value) for value in (600, 0))
    assert isinstance(asked(strict, issued.token), Principal)
    store.close()
    postgres_server.kill()
    # Within its time the last snapshot counts, and wrong tokens stay wrong; then nobody may.
    until(lambda: asked(strict, issued.token) == "keys_unavailable")
    assert asked(strict, "rk_ffffffffffff.x") == "keys_unavailable"
    assert strict.problem
    assert isinstance(asked(patient, issued.token), Principal)
    assert asked(patient, "rk_ffffffffffff.x") == "invalid_api_key"
    late = start(at, wait=False, every=0.1)  # one that starts now knows no key
    assert asked(late, issued.token) == "keys_unavailable"
    postgres_server.start()
    for one in (strict, patient, late):
        until(lambda one=one: isinstance(asked(one, issued.token), Principal), 20)
    store.revoke(issued.key.id)
    for one in (strict, patient, late):
        until(lambda one=one: asked(one, issued.token) == "invalid_api_key")
    store.close()


def test_a_token_is_in_no_message_and_no_label(store: KeyStore, start: Start) -> None:
    issued = store.create("acme", "x")
    one = start()
    secret = issued.token.partition(".")[2]
    found = asked(one, issued.token)
    with pytest.raises(ApiError) as caught:
        one.authenticate(bearer(issued.token + "x"))
    shown = f"{found!r} {caught.value!r} {one._metrics.text().decode()}"
    assert secret not in shown
    assert issued.key.id in repr(found)
