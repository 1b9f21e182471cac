"""The block ``cache`` of the gateway's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from resources.keys.records import Slug


class Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exact(Closed):
    """Answers to the very same request. In this process, and in Redis where there is an address.

    ``any_sampling`` also keeps answers that another try would word otherwise: temperature above 0
    and no seed.
    """

    enabled: bool = True
    ttl_seconds: float = Field(default=3600.0, gt=0, le=30 * 86_400)
    max_bytes: int = Field(default=128 << 20, ge=1 << 16)  # of this process
    max_entry_bytes: int = Field(default=1 << 20, ge=1 << 10)
    any_sampling: bool = False
    wait_seconds: float = Field(default=30.0, gt=0, le=600)  # for the same request's first asker
    timeout_ms: int = Field(default=25, ge=1, le=1_000)  # of one look-up in Redis


class Semantic(Closed):
    """Answers to a question that means the same. Set ``threshold`` by `ratchet cache calibrate`.

    ``verify`` is the share of would-be hits that the model answers all the same; ``agreement`` is
    the cosine from which the two answers count as one.
    """

    enabled: bool = False
    threshold: float = Field(default=0.95, gt=0, le=1)  # cosine of two questions
    ttl_seconds: float = Field(default=3600.0, gt=0, le=30 * 86_400)
    verify: float = Field(default=0.02, ge=0, le=1)
    agreement: float = Field(default=0.9, gt=0, le=1)
    model: str = "all-MiniLM-L6-v2"  # packaged, or a folder in sentence-transformers' layout
    budget_ms: int = Field(default=100, ge=1, le=5_000)  # embedding and search together
    max_entries: int = Field(default=10_000, ge=1, le=1_000_000)  # of this process


class Cache(Closed):
    """``personal``: guard policies whose requests are never looked up nor kept."""

    exact: Exact = Exact()
    semantic: Semantic = Semantic()
    personal: frozenset[Slug] = frozenset()
