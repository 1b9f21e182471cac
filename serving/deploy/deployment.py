"""One deployment: install, start the engine, ask it end to end, write the ledger, flip the channel.

The ledger's row is the moment from which the release counts as serving; the channel's pointer
follows it in one rename. So a failure or a kill before the row leaves the old release serving, and
after a kill between row and pointer the next command of this module writes the pointer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from contracts.errors import InputError, RatchetError, ServiceError
from contracts.records import Channel
from contracts.settings import Settings
from resources import approvals, promotion, releases
from resources.ledger import CHANGES, Entry, Ledger, actor
from serving.deploy.engines import LocalEngines, Patience, Say
from serving.deploy.question import OpenRag, Prepared, open_real_rag
from serving.engines import probe
from serving.engines.record import EngineRecord, list_records, stop

__all__ = ["Deployer", "Patience"]


class Deployer:
    """Deploys into one checkout's state folder.

    Args:
        settings: whose state folder, and whose ledger.
        say: told each step.
        patience: how long to wait; None: the defaults.
        open_rag: opens a release's retrieval for the health check.
    """

    def __init__(
        self,
        settings: Settings,
        say: Say,
        patience: Patience | None = None,
        open_rag: OpenRag | None = None,
    ) -> None:
        self.settings, self.say = settings, say
        self.ledger = Ledger.open(settings)
        self.engines = LocalEngines(settings, say, patience or Patience())
        self._open_rag = open_rag or open_real_rag
        self._begun = 0.0  # of the command, monotonic seconds

    # -- commands ----------------------------------------------------------------------------

    def up(self, release: str, channel: str, data_root: Path, reason: str = "") -> dict[str, Any]:
        """Serve a release (a file, or the id of an installed one) on a channel.

        Raises RatchetError; before the ledger's row the channel is then where it was and no new
        engine is left. ConflictError names who promoted another release meanwhile, ApprovalError
        the request that waits for a person.
        """
        releases.channel_path(self.settings, channel)
        with self._alone(f"deploying {release} on {channel}"):
            self._catch_up()
            last = self.ledger.last(channel)
            installed = self._installed(release, data_root)
            approval = approvals.require(self.settings, self.ledger, installed.release, channel)
            return self._serve(
                installed, channel, last, "promoted", reason, _pointer(last), approval
            )

    def rollback(self, channel: str, to: str | None, reason: str) -> dict[str, Any]:
        """Serve a release again that the channel served before.

        Args:
            to: its id; None: the one that the current one came after.

        Raises as :meth:`up`, and InputError where there is no such release.
        """
        releases.channel_path(self.settings, channel)
        with self._alone(f"rolling {channel} back"):
            self._catch_up()
            last = self.ledger.last(channel)
            if last is None:
                raise _nothing_deployed(channel)
            before = self._way_back(channel, last, to)
            installed = self._installed(before.release, self.settings.root)
            return self._serve(installed, channel, last, "rolled_back", reason, before)

    def ensure(self, channel: str | None) -> dict[str, Any]:
        """Bring the engines of the channels back, where they are not running."""
        done = {}
        with self._alone("looking at the channels"):
            self._catch_up()
            changes = self.ledger.channels()
            if channel is not None and channel not in changes:
                raise _nothing_deployed(channel)
            for name, last in changes.items():
                pointer = last.pointer
                if pointer is not None and channel in (None, name):
                    installed = self._installed(pointer.release, self.settings.root)
                    done[name] = self._serve(installed, name, last, "promoted", "", pointer)
        return {"channels": done}

    def down(self, channel: str | None) -> dict[str, Any]:
        """Stop the engine of a channel, or every recorded one. Channels keep pointing."""
        with self._alone("stopping engines"):
            records = list_records(self.settings.engines_dir)
            if channel is not None:
                pointer = releases.read_channel(self.settings, channel)
                records = [r for r in records if pointer and r.release == pointer.release]
            stopped = []
            for record in records:
                if stop(record):
                    self.say(f"engine of release {record.release} stopped")
                    stopped.append(record.release)
        return {"stopped": stopped}

    def status(self) -> dict[str, Any]:
        """Channels, engines and installed releases, asked now."""
        records = list_records(self.settings.engines_dir)
        channels = releases.list_channels(self.settings)
        return {
            "channels": [
                {**c.model_dump(), "healthy": probe.healthy(c.engine_url)} for c in channels
            ],
            "engines": [
                {
                    "release": r.release,
                    "pid": r.pid,
                    "url": r.url,
                    "state": r.state,
                    "alive": r.alive,
                    "log": r.log,
                }
                for r in records
            ],
            "installed": [item.id for item in releases.list_releases(self.settings)],
        }

    # -- steps -------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """End what an earlier command was killed in: rows without a pointer, once their engine
        answers. And begin the ledger, where channels are older than it."""
        for row in promotion.adopt(self.settings, self.ledger):
            self.say(f"the ledger begins with release {row.release} on {row.channel}")
        for line in promotion.differences(self.settings, self.ledger):
            self.say(line)
        for name, change in self.ledger.channels().items():
            current = self._channel(name)
            pointer = change.pointer
            if pointer is None or promotion.settle(pointer, current) == current:
                continue
            engine = self.engines.answering(pointer.release)
            if engine is not None:
                promotion.follow(self.settings, self.ledger, name, {engine.release: engine.url})
                self.say(f"channel {name} points at {pointer.release}, as {change} says")

    def _serve(
        self,
        installed: releases.Installed,
        channel: str,
        last: Entry | None,
        kind: Literal["promoted", "rolled_back"],
        reason: str,
        before: Channel | None,
        approval: int | None = None,
    ) -> dict[str, Any]:
        """Engine, question, row, pointer, in this order.

        Args:
            last: the channel's last change, which the new row builds on.
            before: the pointer that tells which release the next rollback leads to.
            approval: the ledger's row that lets the release in.
        """
        stands = _pointer(last)
        if stands is not None and stands.release != installed.id:
            stands = None  # the ledger says another release: this will be a new row
        current = self._channel(channel)
        if stands is not None and current == promotion.settle(stands, current):
            engine = self.engines.answering(installed.id)
            if current is not None and engine is not None and engine.url == current.engine_url:
                self.say(f"release {installed.id} already answers on {channel}")
                self._end_unused()
                return self._result(current, changed=False)
        prepared = Prepared(installed, self._open_rag)  # while the engine starts
        engine, fresh = self.engines.ready(installed, promotion.named(self.ledger))
        try:
            self.say("asking it a question, end to end")
            prepared.ask(engine)
            if stands is None:
                promotion.record_verdict(self.ledger, installed.release)
                after = _after(channel, installed, engine, before)
                row = promotion.change(self.ledger, kind, after, last, reason, approval)
                self.say(f"ledger: {row}")
        except BaseException:
            if fresh and (stands is not None or not self._was_written(channel, engine)):
                self.say("stopping the new engine")
                stop(engine)
            raise
        found = promotion.follow(self.settings, self.ledger, channel, {engine.release: engine.url})
        assert found is not None
        self.say(f"channel {channel} points at {found.release}")
        try:
            self._end_unused(wait=current is not None)
        except (RatchetError, OSError) as error:  # the release is live: that is the result
            self.say(f"the old engine was not stopped, the next deployment will: {error}")
        return self._result(found, changed=True)

    def _was_written(self, channel: str, engine: EngineRecord) -> bool:
        """Whether the ledger wants this very engine, although the promotion was broken off.
        A ledger that does not answer may have the row: then the engine stays."""
        try:
            pointer = _pointer(self.ledger.last(channel))
        except RatchetError as error:
            self.say(f"the new engine stays, the ledger does not answer: {error.what}")
            return True
        return pointer is not None and pointer.engine_url == engine.url

    def _way_back(self, channel: str, last: Entry, to: str | None) -> Channel:
        """The pointer as it was when the channel last served the release to go back to."""
        now = _pointer(last)
        if last.kind == "rollout" and to is None:
            raise InputError(
                f"A rollout of release {last.release} is under way on channel {channel}.",
                next="take it back: python -m serving.rollout abort; or say --to RELEASE",
            )
        target = to or (now.previous if now else None)
        if now is None or target is None:
            raise InputError(
                f"Channel {channel} has served one release only: there is no way back.",
                next="deploy another one: python -m serving.deploy up --release FILE_OR_ID",
            )
        if target == now.release:
            raise InputError(f"Channel {channel} serves release {target} already.")
        rows = self.ledger.entries(channel=channel, kinds=CHANGES)
        served = [pointer for pointer in map(_pointer, rows) if pointer is not None]
        for pointer in reversed(served):
            if pointer.release == target:
                return pointer
        raise InputError(
            f"Channel {channel} never served release {target}.",
            offenders=[f"served: {one}" for one in dict.fromkeys(p.release for p in served)],
            next="python -m serving.deploy up --release ID promotes a release",
        )

    def _installed(self, release: str, data_root: Path) -> releases.Installed:
        """Install the release, or check the installed one; refuse what the gate did not pass."""
        path = Path(release)
        if path.suffix != ".json" and not path.exists():
            found = releases.verify(self.settings, release)
            releases.certified(found.release, str(found.path))
            return found
        checked = releases.certified(releases.read_release(path), str(path))
        self.say(f"installing release {checked.id}")
        releases.install(path, data_root, self.settings)
        return releases.load(self.settings, checked.id)

    def _channel(self, name: str) -> Channel | None:
        """The pointer as it stands; one that cannot be read is overwritten, and that is said."""
        try:
            return releases.read_channel(self.settings, name)
        except RatchetError as error:
            self.say(f"{error.what} It is written anew.")
            return None

    def _end_unused(self, wait: bool = False) -> None:
        self.engines.end_unused(promotion.named(self.ledger), wait=wait)

    # -- small things ------------------------------------------------------------------------

    def _result(self, channel: Channel, *, changed: bool) -> dict[str, Any]:
        record, row = self.engines.record(channel.release), self.ledger.last(channel.name)
        return {
            "release": channel.release,
            "channel": channel.name,
            "changed": changed,
            "engine_url": channel.engine_url,
            "model": channel.model,
            "previous": channel.previous,
            "ledger": row.seq if row else None,
            "pid": record.pid if record else None,
            "log": record.log if record else None,
            "seconds": round(time.monotonic() - self._begun, 2),
        }

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One deployment at a time. The kernel drops the lock of a process that dies."""
        folder = self.settings.engines_dir
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".deploy.lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise ServiceError(
                    f"Another deployment is running: {stream.read().strip() or 'unknown'}.",
                    where=str(folder),
                    next="wait for it to end, then deploy again",
                ) from None
            stream.truncate(0)
            since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            stream.write(f"{actor()} (pid {os.getpid()}), {what} since {since}")
            stream.flush()
            self._begun = time.monotonic()
            yield


def _pointer(row: Entry | None) -> Channel | None:
    return row.pointer if row is not None else None


def _after(
    name: str, installed: releases.Installed, engine: EngineRecord, before: Channel | None
) -> Channel:
    """The pointer at this release. Its ``previous`` is where the next rollback leads: bringing an
    engine or a release back does not forget that."""
    previous = None
    if before is not None:
        previous = before.previous if before.release == installed.id else before.release
    return Channel(
        name=name, release=installed.id, engine_url=engine.url, model=engine.model,
        previous=previous,
    )  # fmt: skip


def _nothing_deployed(channel: str) -> ServiceError:
    return ServiceError(
        f"Nothing was ever deployed on channel '{channel}'.",
        next="python -m serving.deploy up --release data/release.json",
    )
