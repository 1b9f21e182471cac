"""What was live at a time, and who let it in: answered from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from contracts.errors import InputError
from contracts.records import Channel
from resources.ledger.entry import Entry


@dataclass(frozen=True)
class Served:
    """A channel at one time.

    ``change`` is its last change, ``pointer`` what that one says. ``let_in`` is the change with
    which the pointer's release came onto the channel, and ``approval`` the last ``approved`` row of
    that release before it; None where nobody had to approve.
    """

    pointer: Channel
    change: Entry
    let_in: Entry
    approval: Entry | None


def at(seen: Sequence[Entry]) -> dict[str, Served]:
    """Channels by name.

    Args:
        seen: changes and approvals up to some time, in the order of the ledger.
    """
    changes: dict[str, list[Entry]] = {}
    for entry in seen:
        if entry.pointer is not None:
            changes.setdefault(entry.channel, []).append(entry)
    return {name: _served(rows, seen) for name, rows in sorted(changes.items())}


def let_in(changes: Sequence[Entry], release: str) -> Entry | None:
    """The change with which the release last came onto a channel, or was first tried there.

    Args:
        changes: of one channel, oldest first.
    """
    found, was = None, ""
    for change in changes:
        pointer = change.pointer
        assert pointer is not None
        tried = pointer.candidate is not None and pointer.candidate.release == release
        now = "serves" if pointer.release == release else "tried" if tried else ""
        if now and now != was:
            found = change
        was = now
    return found


def _served(changes: list[Entry], seen: Sequence[Entry]) -> Served:
    """The last of a channel's changes, and how its release came there."""
    pointer = changes[-1].pointer
    assert pointer is not None
    first = let_in(changes, pointer.release)
    assert first is not None
    approvals = [
        entry
        for entry in seen
        if entry.kind == "approved" and entry.release == pointer.release and entry.seq < first.seq
    ]
    if (used := first.body.get("approval")) is not None:  # of several the one that was used
        approvals = [entry for entry in approvals if entry.seq == used]
    return Served(pointer, changes[-1], first, approvals[-1] if approvals else None)


def stamp(time: datetime) -> str:
    """RFC 3339, UTC, microseconds; two stamps compare as text as their times do."""
    if time.tzinfo is None:
        raise InputError("A time without a zone has no place in the ledger.")
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
