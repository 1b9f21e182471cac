"""What follows the ledger here: the pointer of each channel; and what goes in before a promotion.

The ledger is written first. Everything in this module may run again at any time, from any process:
it looks at the ledger, and writes what does not agree with it.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from contracts.errors import RatchetError
from contracts.records import Channel, Release
from contracts.settings import Settings
from resources import certification, releases
from resources.ledger import Entry, Ledger

#: Who wrote the rows of channels that were there before the ledger.
MIGRATION = "migration"


def adopt(settings: Settings, ledger: Ledger) -> list[Entry]:
    """Rows for the channels that a checkout had before it had a ledger.

    Only while nothing was ever promoted by the ledger: later on, a pointer without a row was made
    by hand. A pointer that cannot be read is left out; the next promotion writes it anew.
    """
    changes = ledger.channels()
    if any(entry.kind != "adopted" for entry in changes.values()):
        return []
    made = []
    for path in sorted(settings.channels_dir.glob("[a-z]*.json")):
        with contextlib.suppress(RatchetError):
            channel = releases.read_channel(settings, path.stem)
            if channel is None or channel.name in changes:
                continue
            row = ledger.append(
                "adopted",
                channel=channel.name,
                release=channel.release,
                actor=MIGRATION,
                reason="it served when the ledger began",
                body={"channel": channel.model_dump()},
            )
            made.append(row)
    return made


def record_verdict(
    ledger: Ledger, release: Release, actor: str | None = None, newest: bool = False
) -> Entry:
    """The row of the gate's verdict on a release, and before it that of its policy where that is
    another one than the last. Once a release: a second call gives the row that stands.

    Args:
        newest: the release is the candidate now; write the row again when another one's is newer.
    """
    known = ledger.entries(release=release.id, kinds=["verdict"])
    if newest and known:
        last = ledger.entries(kinds=["verdict"], limit=1)
        known = known if last[0].release == release.id else []
    if known:
        return known[-1]
    body: dict[str, Any] = {"gate": release.gate, "pair": certification.pair_of(release)}
    if "gate" in release.members:
        body["md5"] = release.members["gate"].md5
    policy = {"sha256": release.gate.get("policy_sha256")}
    if policy["sha256"]:
        policies = ledger.entries(kinds=["policy"], limit=1)
        if not policies or policies[0].body != policy:
            ledger.append("policy", actor=actor, body=policy)
    return ledger.append("verdict", release=release.id, actor=actor, body=body, once=not newest)


def change(
    ledger: Ledger,
    kind: Literal["promoted", "rolled_back"],
    channel: Channel,
    last: Entry | None,
    reason: str = "",
    approval: int | None = None,
) -> Entry:
    """The row that changes a channel, where nobody was quicker.

    Args:
        channel: the pointer as it is to be.
        last: the channel's last change as the caller saw it when they began.
        approval: the ``approved`` row that this change uses up.

    Raises ConflictError, which names who was.
    """
    body: dict[str, Any] = {"channel": channel.model_dump()}
    if approval is not None:
        body["approval"] = approval
    return ledger.append(
        kind,
        channel=channel.name,
        release=channel.release,
        reason=reason,
        body=body,
        after=last.seq if last else None,
    )


def follow(
    settings: Settings, ledger: Ledger, name: str, engines: Mapping[str, str] | None = None
) -> Channel | None:
    """Write the channel's pointer as the ledger's last change wants it; give it.

    The ledger says which releases serve. Where their engines answer is this machine's business: an
    engine that was started again has another port, and no row. So an address is taken from
    ``engines``, else from the pointer as it stands, else from the row.

    Runs under a lock with the row read inside it: a writer that was held up writes what is true
    now. None: the ledger knows no such channel, and nothing is written.

    Args:
        engines: URL by release id, of engines that are known to answer.
    """
    with _alone(settings, name):
        certification.follow(settings, ledger)
        last = ledger.last(name)
        if last is None or last.pointer is None:
            return None
        before = _read(settings, name)
        after = settle(last.pointer, before, engines or {})
        if after != before:
            releases.write_channel(settings, after)
        return after


def settle(wanted: Channel, current: Channel | None, engines: Mapping[str, str] = {}) -> Channel:
    """``wanted`` with the addresses of now; see :func:`follow`."""
    known = _addresses(current) | dict(engines)
    candidate = wanted.candidate
    if candidate is not None:
        url = known.get(candidate.release, candidate.engine_url)
        candidate = candidate.model_copy(update={"engine_url": url})
    url = known.get(wanted.release, wanted.engine_url)
    return wanted.model_copy(update={"engine_url": url, "candidate": candidate})


def differences(settings: Settings, ledger: Ledger) -> list[str]:
    """Pointers that say something else than the ledger: left by a kill, or edited by hand."""
    found = []
    changes = ledger.channels()
    for name, entry in sorted(changes.items()):
        current = _read(settings, name)
        if entry.pointer is None or current == settle(entry.pointer, current):
            continue
        says = f"points at {current.release}" if current else "cannot be read"
        if current is not None and current.release == entry.pointer.release:
            says = "differs in its candidate, its model or its previous release"
        found.append(
            f"channel {name} {says}, and {entry} stands: python -m serving.deploy ensure puts it "
            "right"
        )
    for path in sorted(settings.channels_dir.glob("[a-z]*.json")):
        if path.stem not in changes:
            found.append(
                f"channel {path.stem} has a pointer and no row in the ledger: deploy a release to "
                "it, or remove the file"
            )
    return found


def named(ledger: Ledger) -> set[str]:
    """Releases whose engines may be needed: those that a channel serves, tries or is to try."""
    found = set()
    for entry in ledger.channels().values():
        pointer = entry.pointer
        assert pointer is not None
        found |= {pointer.release, entry.release}
        found |= {pointer.candidate.release} if pointer.candidate else set()
    return found


def _addresses(channel: Channel | None) -> dict[str, str]:
    """Engine URL by release."""
    if channel is None:
        return {}
    found = {channel.release: channel.engine_url}
    if channel.candidate is not None:
        found[channel.candidate.release] = channel.candidate.engine_url
    return found


def _read(settings: Settings, name: str) -> Channel | None:
    """The pointer, None where there is none that can be read."""
    with contextlib.suppress(RatchetError):
        return releases.read_channel(settings, name)
    return None


@contextlib.contextmanager
def _alone(settings: Settings, name: str) -> Iterator[None]:
    """One writer of a pointer at a time; the kernel drops the lock of a process that dies."""
    path = releases.channel_path(settings, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{name}.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
