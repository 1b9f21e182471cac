"""The controller of a rollout: looks, decides, does at most one thing, and remembers nothing.

``tick`` reads the ledger, the channel's file, the request log and whether the engine lives. What it
does is a row of the ledger first and the channel's file after it; the file is always written from
the last row, by whoever comes next. So it can be killed at any line and run by anybody: a child of
`ratchet up`, a Dagster sensor, a person. Who else changes the channel meanwhile wins, and the row
of a tick that did not know of it is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from contracts.errors import ConflictError, InputError, NotFoundError, RatchetError
from contracts.records import Candidate, Channel, Strategy
from contracts.settings import Settings
from resources import approvals, promotion, releases
from resources.ledger import Entry, Ledger
from serving.rollout.arms import Arm, reference
from serving.rollout.decision import Decision, decide
from serving.rollout.engines import Busy, Engine, Engines
from serving.rollout.evidence import Evidence, Row, latest
from serving.rollout.policy import Policy
from serving.rollout.state import BODY, Rollout, read

log = logging.getLogger("ratchet.rollout")
#: Rows of the stable release that blue-green compares with, and from which bounds are taken.
HISTORY = 500


@dataclass(frozen=True)
class Report:
    """What a tick found and did. ``did``: nothing, start, observe, forward, promote, back."""

    did: str
    why: str
    rollout: Rollout | None = None
    decision: Decision | None = None

    @property
    def open(self) -> bool:
        """Whether there is more to do."""
        return self.rollout is not None and self.did not in ("promote", "back")


class Controller:
    """Of one channel.

    Args:
        engines: starts and ends them.
        ledger: where the rollout stands.
    """

    def __init__(self, settings: Settings, channel: str, engines: Engines, ledger: Ledger) -> None:
        self.settings, self.channel = settings, channel
        self._engines, self._ledger = engines, ledger
        self._evidence: tuple[int, Evidence] | None = None  # by the row that the step began with
        self._rest_until = 0.0

    # -- commands ----------------------------------------------------------------------------

    def begin(self, release: str, policy: Policy, strategy: Strategy, reason: str = "") -> Entry:
        """Say that an installed release is to be tried; ticks do the rest.

        Raises ConflictError when a rollout is open or the channel was changed meanwhile, InputError
        when there is nothing to compare with, ApprovalError when a person has to say yes first.
        """
        installed = releases.verify(self.settings, release)
        releases.certified(installed.release, str(installed.path))
        promotion.adopt(self.settings, self._ledger)
        last = self._ledger.last(self.channel)
        if last is None or last.pointer is None:
            raise InputError(
                f"Channel {self.channel} serves nothing yet.",
                next=f"deploy the first release: python -m serving.deploy up --release {release}",
            )
        if last.kind == "rollout":
            raise ConflictError(
                f"A rollout of release {last.release} is under way on channel {self.channel}.",
                winner=last,
                next="wait for its end, or end it: python -m serving.rollout abort",
            )
        if last.pointer.release == release:
            raise InputError(f"Channel {self.channel} serves release {release} already.")
        approval = approvals.require(
            self.settings, self._ledger, installed.release, self.channel, "rollout"
        )
        body = {
            "id": f"{release[:8]}-{last.seq}", "action": "begin", "strategy": strategy,
            "policy": policy.model_dump(mode="json"), "policy_digest": policy.digest,
        }  # fmt: skip
        promotion.record_verdict(self._ledger, installed.release)
        pointer = last.pointer.model_copy(update={"candidate": None})
        return self._append("rollout", release, pointer, body, reason, last, approval)

    def abort(self, reason: str) -> Entry:
        """Take the candidate back now. Needs no lock: whoever works meanwhile is refused."""
        last = self._ledger.last(self.channel)
        if last is None or last.kind != "rollout" or last.pointer is None:
            raise NotFoundError(f"No rollout is under way on channel {self.channel}.")
        said = last.body.get(BODY) or {}
        body = {**said, "action": "back", "begun": said.get("begun", last.seq)}
        pointer = last.pointer.model_copy(update={"candidate": None})
        return self._append("rolled_back", pointer.release, pointer, body, reason, last)

    def tick(self) -> Report:
        """Look and do at most one thing. Raises ServiceError when ledger or state folder fail."""
        with self._alone() as mine:
            if not mine:
                return Report("nothing", "another controller is at work")
            try:
                return self._tick()
            except ConflictError as error:
                return Report("nothing", str(error))

    def look(self) -> tuple[Rollout | None, Decision | None]:
        """The open rollout, and what the next tick would decide by what there is now."""
        rollout = read(self._ledger, self.channel)
        if rollout is None or rollout.step == 0:
            return rollout, None
        return rollout, self._decision(rollout, self._counted(rollout))

    # -- one step ----------------------------------------------------------------------------

    def _tick(self) -> Report:
        self._follow()
        rollout = read(self._ledger, self.channel)
        if rollout is None:
            self._evidence = None
            self._retire()
            return Report("nothing", "no rollout is under way")
        candidate = rollout.pointer.candidate
        if candidate is None:
            return self._start(rollout)
        if not self._engines.alive(candidate.release, candidate.engine_url):
            return self._back(rollout, Decision("back", "its engine does not run any more"))
        if rollout.step == 0:
            return self._first_step(rollout)
        return self._judge(rollout)

    def _start(self, rollout: Rollout) -> Report:
        """Start the engine, then let the gateway open the release: no traffic yet."""
        try:
            engine = self._engines.start(rollout.release)
        except Busy as error:
            return Report("nothing", str(error), rollout)
        except RatchetError as error:
            return self._back(rollout, Decision("back", f"its engine did not start: {error.what}"))
        pointer = _with_candidate(rollout, engine, 0.0)
        self._row("rollout", rollout, pointer, rollout.body("observe"), "its engine answers")
        return Report("observe", "its engine answers", rollout)

    def _first_step(self, rollout: Rollout) -> Report:
        """Fix the bounds, from answers of the stable release; wait for them where there are few."""
        began, bounds = time.monotonic(), None
        if began >= self._rest_until:
            bounds = reference(self._history(rollout, None), rollout.policy)
            took = time.monotonic() - began
            if took > 0.25:  # thousands of files, and little that is wanted in them
                self._rest_until = began + 20 * took
        if bounds is not None:
            why = f"bounds: {bounds.ttft_ms:.0f} ms to the first word, cost {bounds.cost:.6g}"
            return self._forward(replace(rollout, bounds=bounds), Decision("forward", why))
        why = f"waiting for {rollout.policy.reference} answers of the stable release"
        if _minutes(rollout.last) >= rollout.policy.step_minutes:
            why = f"undecided: still {why}"
            if rollout.policy.undecided == "back":
                return self._back(rollout, Decision("back", why))
        return Report("nothing", why, rollout)

    def _judge(self, rollout: Rollout) -> Report:
        evidence = self._counted(rollout)
        decision = self._decision(rollout, evidence)
        if decision.action == "hold":
            return Report("nothing", decision.reason, rollout, decision)
        arms = evidence.stable, evidence.candidate
        counted = replace(rollout, requests=rollout.requests + sum(arm.requests for arm in arms))
        if decision.action == "back":
            return self._back(counted, decision, *arms)
        if rollout.step == len(rollout.policy.steps(rollout.strategy)):
            return self._promote(counted, decision, *arms)
        return self._forward(counted, decision, *arms)

    def _decision(self, rollout: Rollout, evidence: Evidence) -> Decision:
        stable, candidate = evidence.stable, evidence.candidate
        return decide(
            rollout.policy, rollout.strategy, rollout.step, stable, candidate,
            requests=rollout.requests + stable.requests + candidate.requests,
            minutes=_minutes(rollout.last),
        )  # fmt: skip

    # -- what it does ------------------------------------------------------------------------

    def _forward(self, rollout: Rollout, decision: Decision, *arms: Arm) -> Report:
        step = rollout.step + 1
        share = rollout.policy.steps(rollout.strategy)[step - 1].share
        old = rollout.pointer.candidate
        assert old is not None
        pointer = _with_candidate(rollout, Engine(old.engine_url, old.model), share)
        body = rollout.body("forward", **_evidence(decision, arms)) | {"step": step, "share": share}
        self._row("rollout", rollout, pointer, body, decision.reason)
        return Report("forward", f"step {step}, share {share:g}", rollout, decision)

    def _promote(self, rollout: Rollout, decision: Decision, *arms: Arm) -> Report:
        old, new = rollout.pointer, rollout.pointer.candidate
        assert new is not None
        pointer = Channel(
            name=old.name, release=new.release, engine_url=new.engine_url, model=new.model,
            previous=old.release,
        )  # fmt: skip
        body = rollout.body("promote", **_evidence(decision, arms))
        self._row("promoted", rollout, pointer, body, decision.reason)
        return Report("promote", decision.reason, rollout, decision)

    def _back(self, rollout: Rollout, decision: Decision, *arms: Arm) -> Report:
        pointer = rollout.pointer.model_copy(update={"candidate": None})
        body = rollout.body("back", candidate=rollout.release, **_evidence(decision, arms))
        self._row("rolled_back", rollout, pointer, body, decision.reason)
        return Report("back", decision.reason, rollout, decision)

    def _row(
        self, kind: Any, rollout: Rollout, pointer: Channel, body: dict[str, Any], reason: str
    ) -> None:
        release = pointer.release if kind == "rolled_back" else rollout.release
        # Who asks what let the release in looks at its promotion.
        approval = rollout.began.body.get("approval") if kind == "promoted" else None
        self._append(kind, release, pointer, body, reason, rollout.last, approval)

    def _append(
        self, kind: Any, release: str, pointer: Channel, body: dict[str, Any], reason: str,
        last: Entry, approval: int | None = None,
    ) -> Entry:  # fmt: skip
        """The row, then the channel's file. An approval is used up by the row that names it."""
        used = {} if approval is None else {"approval": approval}
        entry = self._ledger.append(
            kind, channel=self.channel, release=release, reason=reason, after=last.seq,
            body={"channel": pointer.model_dump(mode="json"), BODY: body, **used},
        )  # fmt: skip
        log.info("%s: %s", entry, reason)
        engines = _engine(pointer)
        promotion.follow(self.settings, self._ledger, self.channel, engines)
        return entry

    def _follow(self) -> None:
        """Write the channel's file, where whoever wrote the last row was killed before it."""
        last, current = self._ledger.last(self.channel), None
        with contextlib.suppress(InputError):  # one that cannot be read is written anew
            current = releases.read_channel(self.settings, self.channel)
        wanted = last.pointer if last is not None else None
        if wanted is not None and promotion.settle(wanted, current) != current:
            promotion.follow(self.settings, self._ledger, self.channel, _engine(wanted))

    # -- what it reads -----------------------------------------------------------------------

    def _counted(self, rollout: Rollout) -> Evidence:
        """The step's evidence so far; what an earlier tick has counted is gone on from."""
        known = self._evidence
        if known is None or known[0] != rollout.last.seq:
            assert rollout.bounds is not None
            alone = rollout.share >= 1 and rollout.strategy == "blue_green"
            since = rollout.last.time
            found = Evidence(
                self.settings, channel=self.channel, rollout=rollout.id,
                stable=rollout.pointer.release, candidate=rollout.release, since=since,
                policy=rollout.policy, bounds=rollout.bounds,
                history=self._history(rollout, since) if alone else [],
            )  # fmt: skip
            known = self._evidence = (rollout.last.seq, found)
        known[1].refresh()
        return known[1]

    def _history(self, rollout: Rollout, before: str | None) -> list[Row]:
        """Recent answers of the stable release."""

        def want(row: Row) -> bool:
            own = row["channel"] == self.channel and row["release"] == rollout.pointer.release
            return own and row["arm"] in ("", "stable")

        return latest(self.settings.requests_dir, want, HISTORY, before)

    def _retire(self) -> None:
        """End the engine that a rollout has left over. It may fail: the next tick is soon."""
        last = self._ledger.last(self.channel)
        if last is not None and BODY in last.body:
            with contextlib.suppress(RatchetError):
                self._engines.retire()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is in a tick. The kernel drops the lock of a process that dies."""
        folder = self.settings.state_dir / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{self.channel}.lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _with_candidate(rollout: Rollout, engine: Engine, share: float) -> Channel:
    candidate = Candidate(
        release=rollout.release, engine_url=engine.url, model=engine.model,
        strategy=rollout.strategy, share=share, rollout=rollout.id,
    )  # fmt: skip
    return rollout.pointer.model_copy(update={"candidate": candidate})


def _engine(pointer: Channel) -> dict[str, str]:
    """The candidate's engine is where its row says: it is never started a second time."""
    candidate = pointer.candidate
    return {candidate.release: candidate.engine_url} if candidate else {}


def _evidence(decision: Decision, arms: tuple[Arm, ...]) -> dict[str, Any]:
    """What the decision was made from."""
    if not arms:
        return {}
    stable, candidate = arms
    return {
        "answers": {"stable": stable.answers, "candidate": candidate.answers},
        "findings": [finding.record() for finding in decision.findings],
    }


def _minutes(entry: Entry) -> float:
    """Since that row. A clock that was set back counts as no time."""
    then = datetime.fromisoformat(entry.time)
    return max((datetime.now(UTC) - then).total_seconds() / 60, 0.0)
