"""What a controller needs of whatever starts engines: local processes now, a cluster later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from contracts.errors import ServiceError


class Busy(ServiceError):
    """Somebody else starts or ends engines now; the next tick asks again."""


@dataclass(frozen=True)
class Engine:
    """One that answers."""

    url: str  # http://host:port, the OpenAI-compatible root without /v1
    model: str  # the name that it serves


class Engines(Protocol):
    """Every method can be called again, by another process, and comes to the same."""

    def start(self, release: str) -> Engine:
        """A ready engine of an installed release that a question was answered by, end to end. One
        that runs is taken as it is. Blocks for as long as an engine needs to start.

        Raises Busy, and RatchetError for an engine that does not come up: none is left then.
        """

    def alive(self, release: str, url: str) -> bool:
        """Whether the engine that was started for the release still runs there. Asks no engine:
        one that is slow is not dead."""

    def retire(self) -> None:
        """End every engine that no channel names, once it has answered what it was asked."""
