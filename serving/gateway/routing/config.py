"""The routing block of the gateway's configuration: providers, logical models, policies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

from contracts.errors import ConfigError
from serving.gateway.endpoint import Endpoint, Timeouts
from serving.gateway.upstream_errors import Dialect

Tier = Literal["fast", "standard", "complex"]
TIERS: tuple[Tier, ...] = ("fast", "standard", "complex")
Policy = Literal["weighted", "least_loaded", "affinity"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class Block(BaseModel):
    """Closed and frozen: an unknown key is an error, and a reload makes a new one."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Provider(Block):
    """A server that speaks the OpenAI API."""

    url: str  # with or without the final /v1
    dialect: Dialect = "openai"
    api_key_env: str | None = None  # the variable's name, never the key
    timeouts: Timeouts = Timeouts()

    @field_validator("url")
    @classmethod
    def _base(cls, value: str) -> str:
        """Scheme, host, port and a path prefix; nothing secret, nothing that a path is added to."""
        if not re.fullmatch(r"https?://[^\s/@?#]+(?:/[^\s?#]*)?", value):
            raise ValueError(
                "is not http(s)://host[:port][/prefix] without user, query or fragment"
            )
        return value.rstrip("/").removesuffix("/v1")


class Candidate(Block):
    """One model at one provider: one replica."""

    provider: str
    model: str = Field(min_length=1)  # the provider's name for it
    weight: PositiveFloat = 1.0  # share of the traffic, or capacity against the others
    tier: Tier | None = None
    tokenizer: str | None = None  # a folder; without one, tokens are estimated
    price: str | None = None  # its name in the price table


class LogicalModel(Block):
    """What clients name.

    ``tiers`` lets the classifier choose among the candidates of a tier; the others are for
    failover: the next stronger tiers first, then the weaker ones.
    """

    name: Name
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    policy: Policy = "weighted"
    tiers: bool = False
    defaults: dict[str, Any] = {}  # fields of the body that a client left out

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.tiers and any(candidate.tier is None for candidate in self.candidates):
            raise ValueError("with tiers, every candidate needs a tier")
        pairs = [(candidate.provider, candidate.model) for candidate in self.candidates]
        if len(set(pairs)) < len(pairs):
            raise ValueError("a provider's model stands twice among the candidates")
        return self


class Retries(Block):
    """When a failed attempt is followed by another. All of it before the first byte."""

    attempts: int = Field(default=3, ge=1, le=10)  # of one request, the first one included
    ratio: float = Field(default=0.1, ge=0, le=1)  # retries per request over time
    burst: float = Field(default=10.0, ge=0)  # retries on top of that, for a moment
    base_seconds: PositiveFloat = 0.05  # full jitter: 0 to base * 2^retries
    max_wait_seconds: PositiveFloat = 2.0  # also for a Retry-After
    give_up_seconds: PositiveFloat = 60.0  # no attempt begins later than this


class BreakerPolicy(Block):
    """When a replica is left alone."""

    failures: int = Field(default=5, ge=1)  # in the window, at least
    ratio: float = Field(default=0.5, gt=0, le=1)  # of all ended attempts in the window, at least
    window_seconds: PositiveFloat = 30.0
    open_seconds: PositiveFloat = 5.0  # doubled by each probe that fails
    max_open_seconds: PositiveFloat = 60.0


class Routing(Block):
    """The block."""

    providers: dict[Name, Provider] = {}
    models: tuple[LogicalModel, ...] = ()
    release_timeouts: Timeouts = Timeouts()  # of the engines behind channels
    retries: Retries = Retries()
    breaker: BreakerPolicy = BreakerPolicy()
    poll_seconds: PositiveFloat = 1.0  # of the engines' queues
    load_factor: float = Field(
        default=1.25, gt=1
    )  # what affinity may put on one replica, against the mean

    @model_validator(mode="after")
    def _known(self) -> Self:
        wrong = [
            f"model '{model.name}': there is no provider '{candidate.provider}'"
            for model in self.models
            for candidate in model.candidates
            if candidate.provider not in self.providers
        ]
        names = [model.name for model in self.models]
        wrong += [f"model '{name}' stands twice" for name in sorted(set(names))
                  if names.count(name) > 1]  # fmt: skip
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def keys(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Provider -> API key. Raises ConfigError with every variable that is missing."""
        found = {
            name: environ.get(provider.api_key_env or "", "")
            for name, provider in self.providers.items()
        }
        missing = [
            f"{provider.api_key_env} (provider '{name}')"
            for name, provider in self.providers.items()
            if provider.api_key_env and not found[name]
        ]
        if missing:
            raise ConfigError(
                "API keys of providers are missing from the environment.",
                where="routing.providers",
                next="set the variables, or take the providers out of the configuration",
                offenders=missing,
            )
        return found

    def endpoint(self, candidate: Candidate, keys: Mapping[str, str]) -> Endpoint:
        """Where a candidate is."""
        provider = self.providers[candidate.provider]
        return Endpoint(
            provider=candidate.provider,
            url=provider.url,
            model=candidate.model,
            dialect=provider.dialect,
            api_key=keys[candidate.provider],
            timeouts=provider.timeouts,
        )
