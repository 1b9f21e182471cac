"""One row of the ledger, and how it is hashed."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal, NamedTuple

from contracts.errors import InputError
from contracts.records import Channel, Record

Kind = Literal[
    "policy",  # the gate's policy that judged a release
    "verdict",  # what the gate said of a release
    "requested",  # a release waits for a named person; body: what they are shown
    "approved",  # body.request: seq of the requested row
    "refused",  # body.request: as above
    "promoted",  # a change: the channel serves this release
    "rolled_back",  # a change: the channel serves an earlier release again
    "rollout",  # a change: another share of the channel, or none, goes to this candidate
    "adopted",  # a change: found on the channel when the ledger began
]
#: Kinds that say what a channel serves. ``body["channel"]`` is its pointer as it is to be.
CHANGES: tuple[Kind, ...] = ("promoted", "rolled_back", "rollout", "adopted")
#: Kinds that answer a ``requested`` row, which ``body["request"]`` names; one answer each.
ANSWERS: tuple[Kind, ...] = ("approved", "refused")
#: What the first row holds for the hash of the row before it.
GENESIS = "0" * 64
_HEAD = re.compile(r"(\d{1,18}):([0-9a-f]{64})")


class Head(NamedTuple):
    """The newest row, in short: whoever noted it elsewhere can tell later that none is missing."""

    seq: int  # 0: there is no row
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """``SEQ:HASH``. Raises InputError."""
        found = _HEAD.fullmatch(text.strip())
        if found is None:
            raise InputError(
                f"{text.strip()[:90]!r} is not the head of a ledger.",
                next="it is SEQ:HASH, as `ratchet ledger verify` prints it",
            )
        return cls(int(found[1]), found[2])


class Entry(Record):
    """A row. ``hash`` covers every other field, ``prev`` among them."""

    seq: int  # 1, 2, 3 ... without a gap
    time: str  # RFC 3339, UTC, microseconds: "2026-11-21T08:41:18.123456Z"
    kind: Kind
    channel: str  # "" for what concerns no channel
    release: str  # release id; "" for what concerns no release
    actor: str  # who: a name, an address, "dagster:<run id>", "migration"
    reason: str  # why, in their words; may be ""
    body: dict[str, Any]  # what a kind has to say besides
    prev: str  # hash of the row before, GENESIS for the first
    hash: str  # 64 hex digits

    def computed(self) -> str:
        """SHA-256 of the canonical JSON of every field but ``hash``."""
        rest = self.model_dump(exclude={"hash"})
        return hashlib.sha256(canonical(rest).encode()).hexdigest()

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)

    @property
    def pointer(self) -> Channel | None:
        """The channel as this row wants it; None for a row that is no change.

        Raises InputError when a newer version of this code wrote it.
        """
        if self.kind not in CHANGES:
            return None
        try:
            return Channel.model_validate(self.body.get("channel"))
        except ValueError as error:
            raise InputError(
                f"Row {self.seq} of the ledger describes a channel that this version of ratchet "
                "does not understand.",
                where=str(error).splitlines()[0],
                next="use the version that wrote it, or a later one",
            ) from None

    def __str__(self) -> str:
        """``row 12, promoted 0123456789abcdef on stable by ann at 2026-11-21 08:41:18 UTC``."""
        parts = [f"row {self.seq}, {self.kind.replace('_', ' ')}"]
        parts += [self.release] if self.release else []
        parts += [f"on {self.channel}"] if self.channel else []
        return " ".join([*parts, f"by {self.actor} at {self.time[:19].replace('T', ' ')} UTC"])


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. Raises ValueError for what JSON has no word for."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
