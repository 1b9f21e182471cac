"""Virtual keys: one contract for SQLite and Postgres; tokens and secrets at rest."""

from __future__ import annotations

import hmac
import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError, InputError, NotFoundError, ServiceError
from contracts.settings import ROOT, Settings
from resources.keys import Key, KeyLimits, KeyStore
from resources.keys.secret import digest, load_pepper
from tests.servers import postgres_server, postgres_url  # noqa: F401

SECRET = "a secret of enough characters"
Open = Callable[..., KeyStore]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Open]:
    """Stores on one database that begins empty."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    opened = []

    def build(secret: str = SECRET) -> KeyStore:
        opened.append(KeyStore.open(replace(settings, postgres_url=url, keys_secret=secret)))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def test_a_key_is_made_and_listed_and_its_token_is_nowhere(
    open_store: Open, settings: Settings
) -> None:
    store = open_store()
    limits = KeyLimits(requests_per_minute=5, spend_day=0.5)
    issued = store.create("acme", "Büro ☎", models=["fast"], limits=limits, guard="strict")
    prefix, _, secret = issued.token.partition(".")
    assert prefix == f"rk_{issued.key.id}"
    assert len(secret) == 43
    assert open_store().list() == [issued.key]
    assert issued.key.limits == limits
    rows = str(store.changes(None))
    assert secret not in rows
    assert secret not in repr(issued)
    for path in settings.state_dir.rglob("*"):
        assert secret.encode() not in path.read_bytes()


def test_every_bad_value_is_named(open_store: Open) -> None:
    with pytest.raises(InputError) as caught:
        open_store().create(
            "no spaces", "x\ny", models=["a b"], expires=float("nan"), limits={"concurrent": 0}
        )
    said = str(caught.value)
    for part in ("tenant", "name", "models.0", "expires", "limits.concurrent"):
        assert part in said
    with pytest.raises(InputError, match="expired"):
        open_store().create("acme", "x", expires=time.time() - 1)


def test_rotation_keeps_the_policy_and_one_old_token(open_store: Open) -> None:
    store = open_store()
    first = store.create("acme", "x", models=["fast"])
    second = store.rotate(first.key.id, grace=60)
    assert second.key == first.key
    assert second.token != first.token
    pepper = SECRET.encode()
    stored = store.changes(None).keys[first.key.id]
    assert stored is not None
    assert stored.digest == digest(pepper, second.token.encode())
    assert stored.old_digest == digest(pepper, first.token.encode())
    assert 50 < stored.old_until - time.time() <= 60
    store.rotate(first.key.id)  # no grace: every older token ends
    stored = store.changes(None).keys[first.key.id]
    assert stored is not None
    assert stored.old_digest is None
    with pytest.raises(InputError, match="grace"):
        store.rotate(first.key.id, grace=-1)


def test_revoking_is_for_good_and_once(open_store: Open) -> None:
    store = open_store()
    issued = store.create("acme", "x")
    gone = store.revoke(issued.key.id)
    assert gone.revoked_at is not None
    assert store.revoke(issued.key.id) == gone
    with pytest.raises(InputError, match="revoked"):
        store.rotate(issued.key.id)
    for unknown in ("f" * 12, "'; DROP TABLE ratchet_keys; --", "\0", ""):
        with pytest.raises(NotFoundError):
            store.revoke(unknown)


def test_changes_since_a_cursor(open_store: Open) -> None:
    writer, reader = open_store(), open_store()
    one, two = writer.create("acme", "one"), writer.create("acme", "two")
    first = reader.changes(None)
    assert first.whole
    assert set(first.keys) == {one.key.id, two.key.id}
    assert reader.changes(first.cursor).keys == {}
    writer.revoke(one.key.id)
    second = reader.changes(first.cursor)
    assert not second.whole
    assert set(second.keys) == {one.key.id}
    # Another database, or an older state of this one: everything again.
    assert reader.changes(("other", second.cursor[1])).whole
    assert reader.changes((second.cursor[0], second.cursor[1] + 5)).whole


def test_writers_at_the_same_time_lose_nothing(open_store: Open) -> None:
    def write(number: int) -> Key:
        return open_store().create("acme", str(number)).key

    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(write, range(24)))
    changes = open_store().changes(None)
    assert set(changes.keys) == {key.id for key in keys}
    assert changes.cursor[1] == 24


def test_another_secret_is_noticed_at_once(open_store: Open) -> None:
    open_store().create("acme", "x")
    with pytest.raises(ConfigError, match="another secret"):
        open_store("another secret than before").list()


def test_a_row_that_cannot_be_read_is_no_key(settings: Settings) -> None:
    store = KeyStore.open(settings)
    issued, other = store.create("acme", "x"), store.create("acme", "y")
    with sqlite3.connect(settings.state_dir / "keys.db") as db:
        record = json.dumps({**json.loads(other.key.model_dump_json()), "tenant": "B B"})
        db.execute("UPDATE ratchet_keys SET record = ? WHERE id = ?", (record, issued.key.id))
    changes = store.changes(None)
    assert changes.keys[issued.key.id] is None
    assert store.list() == [other.key]


def test_what_a_key_allows() -> None:
    key = Key(id="0" * 12, tenant="a", name="x", models=("fast",), releases=("stable", "abc"))
    assert key.allows_model("fast")
    assert not key.allows_model("faster")
    assert key.allows_release("canary", "abc")
    assert key.allows_release("stable", "zzz")
    assert not key.allows_release("canary", "zzz")
    free = Key(id="0" * 12, tenant="a", name="x")
    assert free.allows_model("any")
    assert free.allows_release("any", "any")


def test_files_are_for_their_owner_only(settings: Settings) -> None:
    KeyStore.open(settings).create("acme", "x")
    for name in ("keys.db", "keys.secret"):
        assert stat.S_IMODE((settings.state_dir / name).stat().st_mode) == 0o600
    (settings.state_dir / "keys.secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_pepper(settings)


def test_short_secrets_are_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="RATCHET_KEYS_SECRET"):
        load_pepper(replace(settings, keys_secret="short"))


def test_processes_that_race_agree_on_the_secret(settings: Settings) -> None:
    script = (
        "from contracts.settings import Settings\n"
        "from resources.keys.secret import load_pepper\n"
        "input()\n"
        "print(load_pepper(Settings.from_env()).decode())\n"
    )
    environ = {**os.environ, "RATCHET_STATE_DIR": str(settings.state_dir)}
    several: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environ,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    for process in several:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0].strip() for process in several}
    assert len(found) == 1
    assert len(found.pop()) == 64
    assert [path.name for path in settings.state_dir.iterdir()] == ["keys.secret"]


def test_a_database_that_is_down_is_a_clear_error(settings: Settings, tmp_path: Path) -> None:
    address = "postgresql+psycopg2://me:hidden@127.0.0.1:1/x"
    with pytest.raises(ServiceError) as caught:
        KeyStore.open(replace(settings, postgres_url=address)).list()
    assert "POSTGRES_URL" in str(caught.value)
    assert "hidden" not in str(caught.value)
    store = KeyStore.open(settings)
    (settings.state_dir / "keys.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ServiceError, match=r"keys\.db"):
        store.list()
    (settings.state_dir / "keys.db").unlink()
    with pytest.raises(ServiceError):
        store.list()


def test_the_digest_is_hmac_sha256() -> None:
    """Against the standard library, for keys shorter, as long and longer than a block."""
    for size in (1, 16, 64, 65, 200):
        for token in (b"", b"rk_0123456789ab.secret", bytes(range(256)) * 20):
            pepper = bytes(range(256))[:size]
            assert digest(pepper, token) == hmac.digest(pepper, token, "sha256")
