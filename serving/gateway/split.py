"""Who gets the candidate of a channel: the split of its traffic, the same in every worker.

In: the channel's pointer and a request's session. Out: the release that answers, and the arm that
the request log knows the answer by. Sticky: a session's place between 0 and 1 is a keyed hash of
rollout, tenant and session, and whoever stands below the share has the candidate. So a share that
grows keeps those who have it already, and one that shrinks takes it from the last who came. Without
a session each request has a place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from contracts.records import Candidate

if TYPE_CHECKING:
    from serving.gateway.auth import Principal
    from serving.gateway.exchange import Exchange
    from serving.gateway.live import Live


@dataclass(frozen=True)
class Trial:
    """A channel's candidate. ``live`` is None when its release cannot be opened: those whom it
    would have answered are answered by the stable release, and count as its failures."""

    candidate: Candidate
    live: Live | None

    @property
    def copies(self) -> bool:
        """Whether it gets copies of requests and answers nobody."""
        return self.candidate.strategy == "shadow"


def candidate_route(channel: str) -> str:
    """The router's name for the candidate: both engines have a breaker of their own."""
    return f"{channel} (candidate)"


def choose(
    trial: Trial | None, live: Live, exchange: Exchange, principal: Principal, secret: bytes
) -> Live:
    """The release that answers; the exchange is told its arm.

    A key that may not use the candidate takes no part.
    """
    if trial is None or not principal.key.allows_release(
        live.channel.name, trial.candidate.release
    ):
        return live
    exchange.rollout = trial.candidate.rollout
    mine = not trial.copies and takes(trial.candidate, exchange, principal.tenant, secret)
    exchange.arm = "candidate" if mine else "stable"
    return trial.live if mine and trial.live is not None else live


def takes(candidate: Candidate, exchange: Exchange, tenant: str, secret: bytes) -> bool:
    """Whether the request is below the share."""
    if exchange.session and candidate.strategy != "shadow":
        kind, whose = "session", exchange.session
    else:
        kind, whose = "request", exchange.response_id
    unit = f"{tenant}\0{kind}\0{whose}".encode("utf-8", "replace")
    seed = _seed(secret, candidate.rollout)
    number = int.from_bytes(blake2b(unit, key=seed, digest_size=8).digest(), "big")
    return number < candidate.share * 2**64


@lru_cache(maxsize=16)
def _seed(secret: bytes, rollout: str) -> bytes:
    return blake2b(
        rollout.encode(), key=secret[:64], digest_size=16, person=b"channel-split"
    ).digest()
