"""Requests in the ledger, their one answer each, and the token that lets a person give it.

A request is of one release on one channel against what was live then. When something else went
live meanwhile, what the person was shown is no longer the question: the request is outdated and a
new one is made. An approval is used by the promotion that names it, and lets nothing else in.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.errors import (
    ApprovalError,
    ConflictError,
    InputError,
    NotFoundError,
    RefusedError,
)
from contracts.records import Release
from contracts.settings import Settings
from resources import releases
from resources.approvals.policy import Risk, assess, load
from resources.ledger import CHANGES, Entry, Ledger
from resources.ledger.entry import ANSWERS

#: How a release asked: by a deployment or a rollout; what is tried again after an approval.
Via = Literal["deploy", "rollout"]
State = Literal["waiting", "approved", "refused", "used", "outdated"]


@dataclass(frozen=True)
class Request:
    """A release that asked for a person."""

    entry: Entry  # the ``requested`` row
    state: State
    answer: Entry | None  # the ``approved`` or ``refused`` row

    @property
    def seq(self) -> int:
        return self.entry.seq

    @property
    def against(self) -> str:
        """The release that was live when it asked; "" for none."""
        return str(self.entry.body["against"])

    @property
    def via(self) -> Via:
        """What is to be tried again once it is approved."""
        return "rollout" if self.entry.body.get("via") == "rollout" else "deploy"

    @property
    def risk(self) -> Risk:
        return Risk(self.entry.body["level"], list(self.entry.body["reasons"]))


def requests(ledger: Ledger) -> list[Request]:
    """Every request, oldest first."""
    rows = ledger.entries(kinds=["requested", *ANSWERS, *CHANGES])
    answers = {row.body["request"]: row for row in rows if row.kind in ANSWERS}
    used = {row.body.get("approval") for row in rows if row.kind in CHANGES}
    live: dict[str, str] = {}  # channel -> release, in the end that of now
    for row in rows:
        if row.kind in CHANGES and row.pointer is not None:
            live[row.channel] = row.pointer.release
    found = []
    for row in rows:
        if row.kind != "requested":
            continue
        answer = answers.get(row.seq)
        state: State = "waiting"
        if answer is not None:
            state = "approved" if answer.kind == "approved" else "refused"
        if answer is not None and answer.seq in used:
            state = "used"
        elif state in ("waiting", "approved") and live.get(row.channel, "") != row.body["against"]:
            state = "outdated"
        found.append(Request(row, state, answer))
    return found


def find(ledger: Ledger, seq: int) -> Request:
    """Raises NotFoundError naming those that wait."""
    known = requests(ledger)
    for request in known:
        if request.seq == seq:
            return request
    waiting = ", ".join(str(item.seq) for item in known if item.state == "waiting") or "none"
    raise NotFoundError(f"Row {seq} of the ledger is no request.", next=f"waiting: {waiting}")


def require(
    settings: Settings, ledger: Ledger, release: Release, channel: str, via: Via = "deploy"
) -> int | None:
    """The approval that lets ``release`` onto ``channel``; None when the policy asks for none.

    Called before anything is started, and repeated by whoever tries again: one request stands for
    one question. The caller names the approval's row in the change that uses it
    (``body["approval"]``).

    Args:
        via: how it asks.

    Raises ApprovalError: it waits; RefusedError: a person said no. The request is in the ledger.
    """
    last = ledger.last(channel)
    against = last.pointer.release if last is not None and last.pointer is not None else ""
    if against == release.id:
        return None  # it is live: there is nothing to approve
    live = releases.load(settings, against).release if against else None
    policy = load(settings)
    risk = assess(policy, live, release)
    if not policy.waits(risk.level):
        return None
    asked = [
        item
        for item in requests(ledger)
        if (item.entry.release, item.entry.channel) == (release.id, channel)
        and item.state in ("waiting", "approved", "refused")
        and item.against == against
    ]
    request = asked[-1] if asked else _ask(settings, ledger, release, channel, against, risk, via)
    if request.state == "approved":
        assert request.answer is not None
        return request.answer.seq
    if request.state == "refused":
        raise RefusedError(
            f"Release {release.id} was refused: {request.answer}.",
            where=f"request {request.seq}: {request.answer.reason if request.answer else ''}",
            next="build another release, or ask anew: ratchet approvals ask "
            f"{release.id} --channel {channel}",
        )
    raise ApprovalError(
        f"Release {release.id} waits for a person: its risk is {risk.level}.",
        offenders=risk.reasons,
        where=f"request {request.seq} in the ledger",
        next=f"ratchet approvals show {request.seq}, or the page that "
        f"`ratchet approvals link {request.seq}` prints",
    )


def ask(settings: Settings, ledger: Ledger, release: Release, channel: str) -> Request:
    """A new request, whatever was answered before; the one that waits, where there is one."""
    last = ledger.last(channel)
    against = last.pointer.release if last is not None and last.pointer is not None else ""
    for item in requests(ledger):
        same = (item.entry.release, item.entry.channel) == (release.id, channel)
        if same and item.state == "waiting":
            return item
    live = releases.load(settings, against).release if against else None
    risk = assess(load(settings), live, release)
    return _ask(settings, ledger, release, channel, against, risk, "deploy")


def _ask(
    settings: Settings,
    ledger: Ledger,
    release: Release,
    channel: str,
    against: str,
    risk: Risk,
    via: Via,
) -> Request:
    """Token first, then the row: killed in between, a file is left that no row knows."""
    token = secrets.token_urlsafe(24)
    path = _token_path(settings, _hash(token))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(token)
        stream.flush()
        os.fsync(stream.fileno())
    body: dict[str, Any] = {
        "against": against,
        "via": via,
        "level": risk.level,
        "reasons": risk.reasons,
        "token_sha256": _hash(token),
    }
    row = ledger.append("requested", channel=channel, release=release.id, body=body)
    return Request(row, "waiting", None)


def answer(
    settings: Settings,
    ledger: Ledger,
    seq: int,
    *,
    token: str,
    approve: bool,
    name: str,
    reason: str,
) -> Entry:
    """Write a person's answer, once.

    Args:
        seq: of the request.
        token: what the request's link carries.
        name: who answers; it becomes the row's actor.
        reason: why; a refusal needs one.

    Raises:
        InputError: no name, a refusal without a reason, or the token is not that request's.
        ConflictError: it has its answer already, or another release went live meanwhile.
    """
    request = find(ledger, seq)
    given, right = _hash(token).encode(), str(request.entry.body["token_sha256"]).encode()
    if not hmac.compare_digest(given, right):
        raise InputError(
            f"This token is not that of request {seq}.",
            next=f"ratchet approvals link {seq}, on the machine where it was asked",
        )
    who = " ".join(name.split())
    if not who:
        raise InputError("An answer needs the name of the person who gives it.")
    if not approve and not reason.strip():
        raise InputError("A refusal needs a reason: somebody has to act on it.")
    if request.state == "outdated":
        raise ConflictError(
            f"Request {seq} is outdated: what was live when it was asked is not live now.",
            next="deploy the release again; that asks anew, against what is live",
        )
    row = ledger.append(
        "approved" if approve else "refused",
        channel=request.entry.channel,
        release=request.entry.release,
        actor=who,
        reason=reason.strip(),
        body={"request": seq},
    )
    _token_path(settings, str(request.entry.body["token_sha256"])).unlink(missing_ok=True)
    return row


def token_of(settings: Settings, request: Request) -> str:
    """The token of a request that waits. Raises NotFoundError on any other machine."""
    path = _token_path(settings, str(request.entry.body["token_sha256"]))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(
            f"The token of request {request.seq} is not here.",
            where=str(path.parent),
            next="it lies on the machine where the release was deployed, until it is answered",
        ) from None


def _token_path(settings: Settings, digest: str) -> Path:
    return settings.state_dir / "approvals" / f"{digest[:32]}.token"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
