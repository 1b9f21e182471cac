"""The block ``limits`` of the gateway's configuration, and which accounts a request draws on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from resources.keys.records import Count, KeyLimits, Slug, Spend
from serving.gateway.auth import Principal

#: Seconds of the windows that "per minute" means.
MINUTE = 60.0
#: A session budget without a window of its own holds for five minutes.
SESSION_SECONDS = 300
#: Money is counted in billionths: a token may cost 1e-8.
NANO = 1_000_000_000

Scope = Literal["key", "tenant", "session"]
Backend = Literal["auto", "memory", "sqlite", "redis"]


class TenantLimits(Spend):
    """What all keys of a tenant share."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: int | None = Field(default=None, ge=1, le=100_000)


class Limits(BaseModel):
    """Limits for keys that say nothing of their own, budgets of tenants, and where both are kept.

    ``auto``: Redis when there is an address, SQLite for several workers, else memory.
    ``on_outage`` is what happens while Redis or SQLite does not answer. ``allow``: every worker
    enforces the limits alone, and what was used is added to the store afterwards. ``deny``:
    ``limits_unavailable``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Backend = "auto"
    on_outage: Literal["allow", "deny"] = "allow"
    timeout_ms: int = Field(default=250, ge=1, le=5_000)  # of one decision in Redis or SQLite
    lease_seconds: float = Field(default=60.0, ge=0.1, le=3_600)  # a crash returns them after it
    keys: KeyLimits = KeyLimits()
    tenants: dict[Slug, TenantLimits] = {}

    def max_prompt_tokens(self, principal: Principal) -> int | None:
        own = principal.key.limits.max_prompt_tokens
        return self.keys.max_prompt_tokens if own is None else own


@dataclass(frozen=True, slots=True)
class Rules:
    """What one account allows; None does not restrict. Money in billionths, ``window`` in s."""

    scope: Scope
    window: float = MINUTE
    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    day: int | None = None
    month: int | None = None

    @property
    def empty(self) -> bool:
        return (self.requests, self.tokens, self.concurrent, self.day, self.month) == (None,) * 5


@dataclass(frozen=True, slots=True)
class Plan:
    """The accounts of one key: name and rules each; sessions have an account apiece."""

    accounts: tuple[tuple[str, Rules], ...]
    session: Rules | None

    def of(self, principal: Principal, session: str) -> tuple[tuple[str, Rules], ...]:
        """The accounts of one request. Requests that name no session share one.

        Names begin with the tenant in braces: in a Redis cluster one script may only touch one
        slot. The session's own name is people's text and only its hash is kept.
        """
        if self.session is None:
            return self.accounts
        name = hashlib.blake2b(session.encode("utf-8", "replace"), digest_size=12).hexdigest()
        window = f"{self.session.window:g}"
        account = f"{{{principal.tenant}}}:s:{principal.key_id}:{window}:{name}"
        return (*self.accounts, (account, self.session))


def plan(config: Limits, principal: Principal) -> Plan:
    """Which limits hold for a principal: the key's own, else the configuration's, and its
    tenant's."""
    own, general = principal.key.limits, config.keys
    found = {
        name: value if (value := getattr(own, name)) is not None else getattr(general, name)
        for name in KeyLimits.model_fields
    }
    tenant = config.tenants.get(principal.tenant, TenantLimits())
    rules = (
        (f"{{{principal.tenant}}}:k:{principal.key_id}", _rules("key", found)),
        (f"{{{principal.tenant}}}:t", _rules("tenant", tenant.model_dump())),
    )
    session = None
    if found["session_tokens"] is not None:
        window = float(found["session_seconds"] or SESSION_SECONDS)
        session = Rules("session", window, tokens=found["session_tokens"])
    return Plan(tuple(pair for pair in rules if not pair[1].empty), session)


def counts_tokens(config: Limits, principal: Principal) -> bool:
    """Whether what a request may use at most has to be bounded for this principal."""
    own, general = principal.key.limits, config.keys
    tenant = config.tenants.get(principal.tenant, TenantLimits())
    if own.session_tokens is not None or general.session_tokens is not None:
        return True
    return any(
        (limits.tokens_per_minute, limits.spend_day, limits.spend_month) != (None, None, None)
        for limits in (own, general, tenant)
    )


def nano(amount: float) -> int:
    """Money as billionths, rounded up."""
    return math.ceil(amount * NANO - 1e-6)


def _rules(scope: Scope, found: dict[str, float | None]) -> Rules:
    def count(name: str) -> int | None:
        value = found[name]
        return None if value is None else int(value)

    day, month = found["spend_day"], found["spend_month"]
    return Rules(
        scope,
        requests=count("requests_per_minute"),
        tokens=count("tokens_per_minute"),
        concurrent=count("concurrent"),
        day=None if day is None else nano(day),
        month=None if month is None else nano(month),
    )
