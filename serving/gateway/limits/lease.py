"""What a limiter gives: a lease, or the ApiError that says when to come again."""

from __future__ import annotations

import functools
import math
from types import TracebackType
from typing import Protocol, Self

from serving.gateway.auth import Principal
from serving.gateway.envelope import ApiError
from serving.gateway.limits.account import Refusal
from serving.gateway.limits.config import Limits, Rules
from serving.gateway.metrics import Metrics

_BUDGET = ("spend_day", "spend_month")
_SAYS = {
    "requests": "Too many requests a minute.",
    "tokens": "Too many tokens a minute.",
    "concurrent": "Too many requests at the same time.",
    "spend_day": "The budget of this day is used up.",
    "spend_month": "The budget of this month is used up.",
}
_WHOSE = {"key": "", "tenant": " The limit is shared by all keys of the tenant.", "session": ""}


class Holder(Protocol):
    """What a lease goes back to."""

    def settle(self, lease: Lease, tokens: int, cost: float) -> None: ...

    def lost(self, lease: Lease) -> None:
        """Settle at zero; may come from any thread."""
        ...


class Lease:
    """A reservation, settled exactly once; whichever way a request ends, the first settling counts.

    Use it as a context manager, or settle it yourself: leaving it, or losing the last reference to
    it, settles at zero. The request itself stays counted. Settling never waits and never raises.
    """

    __slots__ = ("_holder", "held", "name", "open", "remaining", "rules")

    def __init__(
        self,
        holder: Holder,
        name: str,
        held: object,
        rules: Rules | None = None,
        remaining: tuple[int, int] = (0, 0),
    ) -> None:
        self._holder, self.name, self.held = holder, name, held
        self.rules, self.remaining = rules, remaining  # of the key: (requests, tokens)
        self.open = True

    def settle(self, *, tokens: int, cost: float) -> None:
        """Say what was really used: tokens of prompts and completions, money in units."""
        if self.open:
            self.open = False
            self._holder.settle(self, tokens, cost)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """``x-ratelimit-*`` of the key, as OpenAI names them; none without limits."""
        if self.rules is None:
            return []
        return ratelimit_headers(self.rules, *self.remaining)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.settle(tokens=0, cost=0.0)

    def __del__(self) -> None:
        if self.open:
            self.open = False
            self._holder.lost(self)


class Limiter(Protocol):
    """Decides whether a request may, and keeps what it may cost reserved until it is settled."""

    async def reserve(
        self, principal: Principal, *, tokens: int, cost: float, session: str = ""
    ) -> Lease:
        """Reserve ``tokens`` (prompt and all answers at most, see most_tokens), ``cost`` in units
        of the price table. Raises ApiError rate_limit_exceeded, budget_exceeded or
        limits_unavailable."""
        ...

    def ample(self, principal: Principal, *, tokens: int, cost: float, session: str = "") -> bool:
        """Whether a request of that size would be far from every limit on tokens and money, so that
        reserving too much for it takes nothing from others. False when this worker cannot tell."""
        ...

    def configure(self, config: Limits) -> None:
        """Use other limits from the next request on. The backend stays."""
        ...

    async def start(self) -> None:
        """Open the store; an unreachable one is an outage and no error."""
        ...

    async def close(self) -> None:
        """Write what waits."""
        ...


def ratelimit_headers(rules: Rules, requests: int, tokens: int) -> list[tuple[bytes, bytes]]:
    """Headers of a key's rules, given what remains. A window that was just used is empty again
    after its whole length."""
    found: list[tuple[bytes, bytes]] = []
    for name, limit, left in (
        ("requests", rules.requests, requests),
        ("tokens", rules.tokens, tokens),
    ):
        if limit is not None:
            most, remaining, reset = _fixed(name, limit, rules.window)
            found += (most, (remaining, b"%d" % max(0, left)), reset)
    return found


@functools.lru_cache(4096)
def _fixed(
    name: str, limit: int, window: float
) -> tuple[tuple[bytes, bytes], bytes, tuple[bytes, bytes]]:
    """What is the same in the headers of every request of a key."""
    return (
        (f"x-ratelimit-limit-{name}".encode(), b"%d" % limit),
        f"x-ratelimit-remaining-{name}".encode(),
        (f"x-ratelimit-reset-{name}".encode(), b"%ds" % math.ceil(window)),
    )


def refused(refusal: Refusal, metrics: Metrics) -> ApiError:
    """The error of a refusal; counted."""
    metrics.limited.labels(refusal.limit, refusal.scope).inc()
    message = _SAYS[refusal.limit] + _WHOSE[refusal.scope]
    if refusal.scope == "session":
        message = "The token budget of this session is used up."
    headers = {}
    if refusal.retry_after is None:
        message = "The request alone may use more tokens than the limit allows: ask for fewer."
    else:
        headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after)))
    code = "budget_exceeded" if refusal.limit in _BUDGET else "rate_limit_exceeded"
    return ApiError(code, message, headers=headers)


def unavailable(metrics: Metrics) -> ApiError:
    """The error of an outage under ``deny``; counted."""
    metrics.limits_outage.labels("deny").inc()
    return ApiError(
        "limits_unavailable", "Limits cannot be checked right now.", headers={"retry-after": "1"}
    )
