"""Engines of installed releases as processes of this machine: found or started, asked, ended.

Each is on record under ``<state>/engines`` from its first moment, so that whatever a killed
deployment left behind is found and ended by the next one.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import RatchetError, ServiceError
from contracts.settings import ROOT, Settings
from resources import processes, releases
from serving.engines import probe
from serving.engines.record import EngineRecord, list_records, read_record, stop

#: The gateway looks at the pointer every 0.5 s and opens the release before it switches.
SWITCH_SECONDS = 3.0
#: Engines have no keys: the gateway is the only way in, whatever address it listens on itself.
LOOPBACK = "127.0.0.1"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    """Seconds: for an engine's first token, and for answers that the old engine still gives."""

    ready: float = 300.0  # 40 s on two quiet cores; 220 s were seen on loaded ones
    drain: float = 60.0


class LocalEngines:
    """Of one checkout. One caller at a time: whoever holds the deployments' lock.

    Args:
        settings: whose state folder.
        say: told each step.
        patience: how long to wait.
    """

    def __init__(self, settings: Settings, say: Say, patience: Patience) -> None:
        self.settings, self.say, self.patience = settings, say, patience

    def record(self, release_id: str) -> EngineRecord | None:
        """What is known of that release's engine."""
        return read_record(self._path(release_id))

    def answering(self, release_id: str) -> EngineRecord | None:
        """The release's engine, if a token comes out of it now."""
        known = self.record(release_id)
        if known is None or not known.alive or known.state != "ready":
            return None
        try:
            probe.tokens_flow(known.url, known.model)
        except ServiceError:
            return None
        return known

    def ready(
        self, installed: releases.Installed, keep: Collection[str]
    ) -> tuple[EngineRecord, bool]:
        """An engine of that release that gives tokens, and whether it was started for this call.

        Args:
            keep: releases whose engines stay, whatever the pointers say.

        Raises ServiceError; nothing that this call started is left then.
        """
        if (known := self.answering(installed.id)) is not None:
            self.say(f"its engine already runs at {known.url}")
            return known, False
        if (left := self.record(installed.id)) is not None:
            self.say("stopping what is left of an earlier engine of this release")
            stop(left)
        # A killed deployment's engine would share our cores.
        self.end_unused(keep, drain=False)
        return self._start(installed), True

    def end_unused(self, keep: Collection[str], wait: bool = False, drain: bool = True) -> None:
        """End engines that no channel points at; those that answer may finish first.

        Args:
            keep: releases whose engines stay besides.
            wait: until the gateway has seen the pointers as they are now.
            drain: let them finish what they answer.
        """
        try:
            used = _addresses(self.settings)
        except RatchetError as error:  # its engine is unknown, and may be one that serves
            self.say(f"no engine is stopped: {error.what}")
            return
        records = list_records(self.settings.engines_dir)
        unused = [r for r in records if r.url not in used and r.release not in keep]
        if unused and wait:
            time.sleep(SWITCH_SECONDS)  # the gateway needs a moment to see the new pointer
        for record in unused:
            if drain and record.alive and record.state == "ready":
                self.say(f"draining the engine of release {record.release}")
                processes.wait_until(
                    lambda url=record.url: not probe.in_flight(url),  # type: ignore[misc]
                    self.patience.drain,
                    every=0.5,
                )
            stop(record)
            self.say(f"engine of release {record.release} stopped")

    def end(self, release_id: str) -> bool:
        """End the release's engine, whoever uses it; say whether anything had to be ended."""
        record = self.record(release_id)
        return record is not None and stop(record)

    # -- inside ------------------------------------------------------------------------------

    def _path(self, release_id: str) -> Path:
        return self.settings.engines_dir / f"{release_id}.json"

    def _start(self, installed: releases.Installed) -> EngineRecord:
        """Start an engine that outlives us and wait until tokens flow."""
        path = self._path(installed.id)
        logs = self.settings.engines_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log, said = logs / f"{installed.id}.log", logs / f"{installed.id}.said"
        command = [
            sys.executable, "-m", "serving.engines", "--bundle", str(installed.bundle),
            "--host", LOOPBACK, "--port", "0", "--log", str(log), "--record", str(path),
            "--release", installed.id, "--ready-timeout", str(self.patience.ready),
        ]  # fmt: skip
        self.say(f"starting the engine (about 40 s, up to {self.patience.ready:g} s); log {log}")
        with said.open("wb") as stream:  # a file and no pipe: the engine outlives its reader
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
        begun = time.monotonic()
        try:
            while True:
                record = read_record(path)
                if record is not None and record.pid == child.pid and record.state == "ready":
                    self.say(f"tokens flow after {time.monotonic() - begun:.0f} s at {record.url}")
                    return record
                if child.poll() is not None:
                    raise ServiceError(
                        "The engine of the new release did not start.",
                        where=f"release {installed.id}",
                        next=said.read_text(encoding="utf-8", errors="replace").strip(),
                    )
                time.sleep(0.1)
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
            raise


def _addresses(settings: Settings) -> set[str]:
    """Engine URLs that the channels' pointers name. Raises RatchetError for a broken pointer."""
    found = set()
    for channel in releases.list_channels(settings):
        found.add(channel.engine_url)
        if channel.candidate is not None:
            found.add(channel.candidate.engine_url)
    return found
