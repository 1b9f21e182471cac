"""Limits and budgets: reserved before a request, settled at what was really produced."""

from contracts.settings import Settings
from serving.gateway.limits.config import Limits
from serving.gateway.limits.journal import SpendJournal
from serving.gateway.limits.lease import Lease, Limiter
from serving.gateway.limits.memory import MemoryLimiter
from serving.gateway.metrics import Metrics

__all__ = ["Lease", "Limiter", "Limits", "open_limiter"]


def open_limiter(
    config: Limits, settings: Settings, metrics: Metrics, *, workers: int = 1
) -> Limiter:
    """The limiter that the configuration asks for; start it, and close it at the end."""
    from contracts.errors import ConfigError
    from serving.gateway.limits.redis import RedisLimiter
    from serving.gateway.limits.sqlite import SqliteLimiter

    backend = config.backend
    if backend == "auto":
        backend = "redis" if settings.redis_url else "sqlite" if workers > 1 else "memory"
    if backend == "redis":
        if settings.redis_url is None:
            raise ConfigError(
                "limits.backend is redis, and there is no address.",
                where=str(settings.gateway_config),
                next="set REDIS_URL, or limits.backend to memory or sqlite",
            )
        return RedisLimiter(config, metrics, settings.redis_url)
    if backend == "sqlite":
        return SqliteLimiter(config, metrics, settings.state_dir / "limits.db")
    return MemoryLimiter(config, metrics, SpendJournal(settings.state_dir / "spend.db"))
