"""Answers that need no model: to the same request and, if configured, to one that means it."""

from serving.gateway.cache.answer import Answer
from serving.gateway.cache.config import Cache
from serving.gateway.cache.purges import Purge
from serving.gateway.cache.response_cache import Flight, Hit, ResponseCache
from serving.gateway.cache.scope import Scope, scope, target_of

__all__ = [
    "Answer",
    "Cache",
    "Flight",
    "Hit",
    "Purge",
    "ResponseCache",
    "Scope",
    "scope",
    "target_of",
]
