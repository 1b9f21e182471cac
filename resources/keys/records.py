"""What a virtual key is: whom it stands for and what it may do. Never its secret."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

#: Tenants, features and policies are labels and parts of store keys: no spaces, no separators.
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
#: A model, channel or release as clients and configurations write it.
Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
Count = Annotated[int, Field(ge=1, le=10**12)]
#: Units of the price table's currency. At most 1e6: 1e15 billionths, exact in a Lua number.
Money = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]

#: Unix seconds up to the year 9999.
Moment = Annotated[float, Field(ge=0, le=253_402_300_799, allow_inf_nan=False)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spend(Closed):
    """Budgets of one payer in UTC calendar periods; None does not restrict."""

    spend_day: Money | None = None
    spend_month: Money | None = None


class KeyLimits(Spend):
    """Limits of one key. None: whatever the gateway's configuration says for keys that say nothing.

    Rates hold in *every* window of 60 s, the session budget in every ``session_seconds``.
    """

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None  # prompt and completion
    concurrent: Annotated[int, Field(ge=1, le=100_000)] | None = None  # requests, streams included
    max_prompt_tokens: Count | None = None
    session_tokens: Count | None = None
    session_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None


class Key(Closed):
    """One virtual key. Times are Unix seconds (UTC); empty lists do not restrict."""

    id: str  # 12 hexadecimal digits, public: logs and metrics may name it
    tenant: Slug
    name: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,100}$")]
    models: tuple[Target, ...] = ()  # logical models it may name
    releases: tuple[Target, ...] = ()  # channels or release ids that may answer it
    feature: Slug | None = None  # what costs are attributed to when the request says nothing
    guard: Slug | None = None  # guard policy; None: the gateway's default
    limits: KeyLimits = KeyLimits()
    created: Moment = 0.0
    expires: Moment | None = None
    revoked_at: Moment | None = None

    def allows_model(self, name: str) -> bool:
        return not self.models or name in self.models

    def allows_release(self, channel: str, release: str) -> bool:
        """Whether a release may answer, by its channel's name or by its id."""
        return not self.releases or channel in self.releases or release in self.releases

    def usable(self, now: float) -> bool:
        """Neither revoked nor expired at ``now`` (Unix seconds)."""
        return self.revoked_at is None and (self.expires is None or now < self.expires)
