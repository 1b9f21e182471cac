"""Where a rollout stands, read from the ledger: its rows are all that is remembered of it.

Every row of a rollout is a *change* of its channel, so each one names the row that it builds on and
of two controllers one is refused. ``body["rollout"]`` holds:

=========  =============  ==================================================================
action     kind           what it says
=========  =============  ==================================================================
begin      rollout        this release is to be tried: strategy, policy, its digest
observe    rollout        its engine runs; share 0
forward    rollout        step n and its share; from step one on the bounds of ttft and cost
promote    promoted       the channel serves it
back       rolled_back    the channel serves the stable release alone, and why
=========  =============  ==================================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from contracts.errors import InputError
from contracts.records import Channel, Strategy
from resources.ledger import Entry, Ledger
from serving.rollout.arms import Reference
from serving.rollout.policy import Policy

BODY = "rollout"


@dataclass(frozen=True)
class Rollout:
    """An open rollout. ``last`` is its newest row, ``began`` its first one."""

    began: Entry
    last: Entry
    pointer: Channel  # what the channel's file has to say
    policy: Policy
    strategy: Strategy
    step: int  # 0: not started
    bounds: Reference | None
    requests: int  # of both arms before this step

    @property
    def id(self) -> str:
        return str(self.began.body[BODY]["id"])

    @property
    def channel(self) -> str:
        return self.began.channel

    @property
    def release(self) -> str:
        """The candidate."""
        return self.began.release

    @property
    def share(self) -> float:
        return self.pointer.candidate.share if self.pointer.candidate else 0.0

    def body(self, action: str, **more: Any) -> dict[str, Any]:
        """What the next row says of the rollout."""
        bounds = asdict(self.bounds) if self.bounds else None
        first = {"id": self.id, "begun": self.began.seq, "action": action}
        return {**first, "step": self.step, "bounds": bounds, "requests": self.requests, **more}


def read(ledger: Ledger, channel: str) -> Rollout | None:
    """The channel's open rollout; None when its last change is something else.

    Raises InputError for rows that a newer version wrote.
    """
    last = ledger.last(channel)
    if last is None or last.kind != "rollout":
        return None
    said = last.body.get(BODY)
    begun = said.get("begun") if isinstance(said, dict) else None
    began = ledger.get(begun) if begun else last
    pointer = last.pointer
    try:
        assert began is not None and pointer is not None and said is not None
        first = began.body[BODY]
        bounds = said.get("bounds")
        return Rollout(
            began, last, pointer,
            policy=Policy.model_validate(first["policy"]),
            strategy=first["strategy"],
            step=int(said.get("step", 0)),
            bounds=Reference(**bounds) if bounds else None,
            requests=int(said.get("requests", 0)),
        )  # fmt: skip
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"Row {last.seq} of the ledger is no rollout that this version understands: {error!r}.",
            next="use the version that wrote it, or take it back: "
            f"python -m serving.rollout abort --channel {channel}",
        ) from None
