"""What the handlers of one gateway work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.gateway.auth import Authenticator, Principal
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.cache.scope import target_of
from serving.gateway.config import GatewayConfig, Price
from serving.gateway.guards.run import Guards
from serving.gateway.limits import Limiter
from serving.gateway.limits.tokens import TokenCounter, Tokenizers
from serving.gateway.live import LiveRelease
from serving.gateway.metrics import Metrics
from serving.gateway.prompt_choice import PromptChooser
from serving.gateway.recording import Recording
from serving.gateway.retrieval import Retriever
from serving.gateway.routing.router import Router

if TYPE_CHECKING:  # it copies whole requests, and so needs what needs the services
    from serving.gateway.shadow import Shadow


@dataclass(frozen=True)
class Configured:
    """Everything that follows from the configuration file and is swapped with it at once."""

    config: GatewayConfig
    guards: Guards
    counters: dict[str, TokenCounter]  # by logical model
    dearest: dict[str, Price]  # by logical model: what is reserved before a candidate is chosen
    targets: dict[str, str]  # by logical model: who may answer, for the cache

    def policy(self, principal: Principal) -> str:
        """The guard policy of a key: its own, else the configuration's."""
        return principal.key.guard or self.config.guard

    def price(self, name: str | None) -> Price:
        """A candidate's price; without one it costs nothing."""
        return self.config.prices.get(name or "", FREE)


FREE = Price()


@dataclass
class Services:
    """The parts that live as long as the process, and ``now``, which a reload replaces."""

    live: LiveRelease
    router: Router
    retriever: Retriever
    prompts: PromptChooser
    authenticator: Authenticator
    limiter: Limiter
    tokenizers: Tokenizers
    cache: ResponseCache
    recording: Recording
    shadow: Shadow
    metrics: Metrics
    now: Configured
    salt: bytes  # secret, the same for all workers: keys hashes of what clients name
    in_flight: int = 0
    draining: Callable[[], bool] = field(default=lambda: False)


def dearest(config: GatewayConfig) -> dict[str, Price]:
    """The highest price among each model's candidates."""
    found = {}
    for model in config.routing.models:
        prices = [config.prices[c.price] for c in model.candidates if c.price is not None]
        found[model.name] = Price(
            input=max((price.input for price in prices), default=0.0),
            output=max((price.output for price in prices), default=0.0),
        )
    return found


def targets(config: GatewayConfig) -> dict[str, str]:
    """What the answers of each model depend on, see cache.scope."""
    urls = {name: provider.url for name, provider in config.routing.providers.items()}
    return {model.name: target_of(model, urls) for model in config.routing.models}
