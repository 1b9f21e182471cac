"""The telemetry block of the gateway's configuration. Where spans go is an address and therefore
stands in the environment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Telemetry(BaseModel):
    """The block ``telemetry``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_ratio: float = Field(default=1.0, ge=0, le=1)  # of requests that bring no decision
    content: bool = False  # question and answer, masked, as span attributes
    queue: int = Field(default=4096, ge=1, le=1_000_000)  # requests that may wait for the collector
    features: int = Field(default=50, ge=1, le=10_000)  # distinct labels; the others are "other"
    tenants: int = Field(default=100, ge=1, le=10_000)
