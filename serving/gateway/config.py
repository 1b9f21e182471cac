"""The gateway's configuration: one closed YAML file, each block with the type of its part.

In: the file that ``Settings.gateway_config`` names. Out: a frozen GatewayConfig, or one ConfigError
with every offender. Nothing secret stands in it: keys are named by environment variable.
"""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contracts.errors import ConfigError
from contracts.settings import Settings
from serving.gateway.auth import Auth
from serving.gateway.cache.config import Cache
from serving.gateway.guards.policy import GuardsConfig
from serving.gateway.limits.config import Limits
from serving.gateway.prompt_choice import Experiments
from serving.gateway.request_log import Logs
from serving.gateway.routing.config import Routing
from serving.gateway.telemetry.config import Telemetry

Amount = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Price(Closed):
    """Per million tokens, in whatever currency the budgets are in."""

    input: Amount = 0.0
    output: Amount = 0.0

    def of(self, prompt: int, completion: int) -> float:
        return (prompt * self.input + completion * self.output) / 1e6


class Requests(Closed):
    """What one request, and all of them together, may take from this process."""

    body_bytes: int = Field(default=1 << 20, ge=1_000, le=32 << 20)
    body_seconds: float = Field(default=20.0, gt=0)
    in_flight: int = Field(default=512, ge=1)
    write_seconds: float = Field(default=30.0, gt=0)  # for one piece to a client that reads slowly
    start_seconds: float = Field(default=60.0, ge=0)  # to wait for the first release to be opened
    # Of an answer whose request names no limit, where tokens or money are counted: it is reserved,
    # and engines are told. Larger than an engine's context, it would be refused there.
    max_tokens: int = Field(default=4096, ge=1)


class GatewayConfig(Closed):
    """The file."""

    auth: Auth = Auth()
    requests: Requests = Requests()
    limits: Limits = Limits()
    guard: str = ""  # the policy of keys that name none; "" has no guards
    guards: GuardsConfig = GuardsConfig()
    routing: Routing = Routing()
    prices: dict[str, Price] = {}
    telemetry: Telemetry = Telemetry()
    logs: Logs = Logs()
    cache: Cache = Cache()
    prompts: Experiments = {}  # versions to try against each other, by weight

    @model_validator(mode="after")
    def _names_exist(self) -> GatewayConfig:
        wrong = []
        if self.guard and self.guard not in self.guards.policies:
            wrong.append(f"guard: there is no policy '{self.guard}' in guards.policies")
        wrong += [
            f"model '{model.name}': there is no price '{candidate.price}'"
            for model in self.routing.models
            for candidate in model.candidates
            if candidate.price is not None and candidate.price not in self.prices
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def load(settings: Settings) -> GatewayConfig:
    """Read the file; without one, the defaults, unless the environment names it."""
    path = settings.gateway_config
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        if path == settings.root / "serving" / "gateway.yaml":
            return GatewayConfig()
        raise ConfigError(
            "The gateway's configuration does not exist.",
            where=str(path),
            next="write it, or unset RATCHET_GATEWAY_CONFIG",
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The gateway's configuration cannot be read: {error}", where=str(path)
        ) from None
    try:
        return GatewayConfig.model_validate(value)
    except ValidationError as error:
        raise ConfigError(
            "The gateway's configuration cannot be used.",
            where=str(path),
            offenders=[
                f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
                for item in error.errors()
            ],
            next="mend these keys; docs/gateway.md describes the file",
        ) from None


def refuse_exposed(config: GatewayConfig, host: str, settings: Settings) -> None:
    """Raises ConfigError for a gateway without keys on an address that other machines can reach."""
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ip_address(host).is_loopback
    if not local and not config.auth.required:
        raise ConfigError(
            f"The gateway would answer everyone who can reach {host}.",
            where=f"auth.required in {settings.gateway_config}",
            next="set auth.required: true and make keys with `ratchet keys create`, "
            "or listen on 127.0.0.1",
        )
