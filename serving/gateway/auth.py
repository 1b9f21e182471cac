"""Who asks: a token becomes a Principal, from memory, before a byte of the body is read.

In: the request's headers. Out: a Principal, or ApiError ``invalid_api_key``, which is one and the
same for a token that is missing, malformed, unknown, wrong, revoked or expired, after the same work
(one HMAC, one dictionary look-up, two constant-time comparisons).

A thread asks the store every second what changed. A revocation therefore takes effect on every
worker within REVOCATION_SECONDS, while the store answers. When it does not, the keys read last
count for ``outage_seconds`` more; then requests are refused with ``keys_unavailable``. Tokens that
no key explains are refused at all times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from hmac import compare_digest

from pydantic import BaseModel, ConfigDict, Field

from contracts.errors import RatchetError
from resources.keys import Key, KeyStore, StoredKey
from resources.keys.secret import digest
from resources.keys.store import Cursor
from serving.gateway.envelope import ApiError
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.auth")
REFRESH_SECONDS = 1.0
#: What is promised: one refresh, and as much again for the store to answer.
REVOCATION_SECONDS = 2.0
#: A token has 60 bytes. What is longer is not hashed, so that it costs no more than a token.
MAX_TOKEN = 128
LOCAL_TENANT = "local"
#: What our tokens begin with. OpenAI's clients always send something; where no key is required,
#: a word that is no token of ours is nobody's, but a wrong token of ours is still wrong.
PREFIX = b"rk_"


class Auth(BaseModel):
    """The block ``auth`` of the gateway's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    required: bool = False  # false: who brings no token of ours is the tenant "local"
    outage_seconds: float = Field(default=300.0, ge=0)  # how long the last keys count, store down


class Principal:
    """Who asks. ``key`` is the key's record; its limits, models and policies stand there."""

    __slots__ = ("key", "key_id", "tenant")

    def __init__(self, key: Key) -> None:
        self.key, self.key_id, self.tenant = key, key.id, key.tenant

    def __repr__(self) -> str:
        return f"Principal({self.tenant}/{self.key_id})"


class _Entry:
    """A key as the hot path compares it."""

    __slots__ = ("digest", "expires", "old_digest", "old_until", "principal")

    def __init__(self, stored: StoredKey) -> None:
        key = stored.key
        self.principal = Principal(key)
        self.digest = stored.digest
        self.old_digest = stored.old_digest or bytes(32)
        self.old_until = stored.old_until if stored.old_digest else 0.0
        ends = float("inf") if key.expires is None else key.expires
        self.expires = ends if key.revoked_at is None else 0.0


#: Compared with when there is no such key. Its expiry has passed, so it never lets anybody in.
_NOBODY = _Entry(
    StoredKey(Key(id="0" * 12, tenant="nobody", name="nobody", revoked_at=1.0), bytes(32))
)
ANONYMOUS = Principal(Key(id="anonymous", tenant=LOCAL_TENANT, name="anonymous"))


class Authenticator:
    """Answers who asks, and keeps the keys fresh between ``start`` and ``close``.

    Args:
        store: the keys; used by this object's thread only.
        config: see Auth.
        metrics: counts refusals and failed refreshes, shows the age of the keys.
        refresh_seconds: for tests.
    """

    def __init__(
        self,
        store: KeyStore,
        config: Auth,
        metrics: Metrics,
        *,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._store, self.config, self._metrics = store, config, metrics
        self._pepper = store.pepper
        self._entries: dict[bytes, _Entry] = {}
        self._cursor: Cursor | None = None
        self._fresh_at = float("-inf")  # time.monotonic() of the last good refresh's begin
        self._refresh_seconds = refresh_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="refresh-keys", daemon=True)
        self._complained = float("-inf")
        metrics.keys_age.set_function(lambda: time.monotonic() - self._fresh_at)

    def start(self) -> None:
        """Begin to read the keys. Returns at once; until they are there, tokens get a 503."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Blocks for at most what a hanging database may take."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)
        self._store.close()

    @property
    def problem(self) -> str | None:
        """Why tokens cannot be judged, for readiness; None when they can."""
        age = time.monotonic() - self._fresh_at
        if age <= self.config.outage_seconds + REVOCATION_SECONDS:
            return None
        return "the keys were not read yet" if age == float("inf") else "the keys are out of date"

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """The principal of a request.

        Args:
            headers: as ASGI gives them: names in lower case.

        Raises ApiError ``invalid_api_key`` or ``keys_unavailable``.
        """
        token = None
        for name, value in headers:
            if name == b"authorization":
                # "Bearer" in any case (RFC 9110); another scheme leaves what no key explains.
                found = value[7:].strip() if value[:7].lower() == b"bearer " else b""
            elif name == b"x-api-key":
                found = value.strip()
            else:
                continue
            if token is not None and token != found:
                found = b""  # two tokens: nobody may choose which one counts
            token = found
        if not self.config.required and (token is None or not token.startswith(PREFIX)):
            return ANONYMOUS
        return self._judge(token or b"")

    def _judge(self, token: bytes) -> Principal:
        if time.monotonic() - self._fresh_at > self.config.outage_seconds + REVOCATION_SECONDS:
            self._metrics.auth_refused.labels("keys_unavailable").inc()
            raise ApiError(
                "keys_unavailable",
                "API keys cannot be checked right now.",
                headers={"retry-after": "5"},
            )
        if len(token) > MAX_TOKEN:
            token = b""
        seen = digest(self._pepper, token)
        # The id stands between "rk_" and the dot. A wrong prefix fails in the digest.
        entry = self._entries.get(token[3 : token.find(b".")], _NOBODY)
        now = time.time()
        right = compare_digest(seen, entry.digest)
        # Both comparisons and all conditions are always worked out: no answer comes sooner.
        old = compare_digest(seen, entry.old_digest) & (now < entry.old_until)
        if (right | old) & (now < entry.expires):
            return entry.principal
        self._metrics.auth_refused.labels("invalid_api_key").inc()
        raise ApiError(
            "invalid_api_key",
            "The API key is missing or not valid.",
            headers={"www-authenticate": "Bearer"},
        )

    def refresh(self) -> None:
        """Read what changed. Raises RatchetError; the keys read before stay."""
        began = time.monotonic()
        changes = self._store.changes(self._cursor)
        entries = {} if changes.whole else dict(self._entries) if changes.keys else self._entries
        for key_id, stored in changes.keys.items():
            if stored is None:
                entries.pop(key_id.encode(), None)
            else:
                entries[key_id.encode()] = _Entry(stored)
        self._entries, self._cursor, self._fresh_at = entries, changes.cursor, began

    def _work(self) -> None:
        while True:
            try:
                self.refresh()
            except Exception as error:  # whatever it is, the thread must live to try again
                self._metrics.keys_refresh_failures.inc()
                self._complain(error)
            if self._stop.wait(self._refresh_seconds):
                return

    def _complain(self, error: Exception) -> None:
        """At most one line in ten seconds; a traceback only for what should not happen."""
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            known = isinstance(error, RatchetError)
            log.error("the keys cannot be refreshed: %s", error, exc_info=not known)
