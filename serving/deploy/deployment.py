"""One deployment: install, start the engine, ask it end to end, flip the channel, end the old one.

The channel is flipped last, in one rename, so a failure or a kill before it leaves the old release
serving. Whatever a killed deployment left behind (a half-started engine, an old one that was not
stopped) is on record under ``<state>/engines`` and is ended by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import RatchetError, ServiceError
from contracts.records import Channel
from contracts.settings import Settings
from resources import processes, releases
from resources.rag import Rag
from serving.engines import probe
from serving.engines.record import EngineRecord, list_records, read_record, stop

#: Any question will do: passages are taken whatever their score, and a token must come out.
QUESTION = "What is a release and how is it made?"
#: The gateway looks at the pointer every 0.5 s and opens the release before it switches.
SWITCH_SECONDS = 3.0
#: Engines have no keys: the gateway is the only way in, whatever address it listens on itself.
LOOPBACK = "127.0.0.1"
Say = Callable[[str], None]
OpenRag = Callable[[releases.Installed], Rag]


@dataclass(frozen=True)
class Patience:
    """Seconds: for an engine's first token, and for answers that the old engine still gives."""

    ready: float = 300.0  # 40 s on two quiet cores; 220 s were seen on loaded ones
    drain: float = 60.0


class Deployer:
    """Deploys into one checkout's state folder.

    Args:
        settings: whose state folder.
        say: told each step.
        patience: how long to wait.
        open_rag: opens a release's retrieval for the health check.
    """

    def __init__(
        self,
        settings: Settings,
        say: Say,
        patience: Patience = Patience(),
        open_rag: OpenRag | None = None,
    ) -> None:
        self.settings, self.say, self.patience = settings, say, patience
        self._open_rag = open_rag or open_real_rag

    # -- commands ----------------------------------------------------------------------------

    def up(self, release: str, channel: str, data_root: Path) -> dict[str, Any]:
        """Serve a release (a file, or the id of an installed one) on a channel.

        Raises RatchetError; the channel is then where it was and no new engine is left.
        """
        releases.channel_path(self.settings, channel)
        begun = time.monotonic()
        with self._alone():
            installed = self._installed(release, data_root)
            before = self._channel(channel)
            if before and before.release == installed.id and self._answers(before):
                self.say(f"release {installed.id} already answers on {channel}")
                self._end_unused()
                return self._result(before, changed=False, begun=begun)
            prepared = Prepared(installed, self._open_rag)  # while the engine starts
            engine, fresh = self._engine(installed)
            try:
                self._ask(installed, engine, prepared)
                after = Channel(
                    name=channel,
                    release=installed.id,
                    engine_url=engine.url,
                    model=engine.model,
                    previous=_previous(before, installed.id),
                )
                releases.write_channel(self.settings, after)
            except BaseException:
                if fresh:
                    self.say("stopping the new engine")
                    stop(engine)
                raise
            self.say(f"channel {channel} points at {installed.id}")
            try:
                self._end_unused(wait=before is not None)
            except (RatchetError, OSError) as error:  # the release is live: that is the result
                self.say(f"the old engine was not stopped, the next deployment will: {error}")
            return self._result(after, changed=True, begun=begun)

    def ensure(self, channel: str | None) -> dict[str, Any]:
        """Bring the engines of the channels back, where they are not running."""
        names = [channel] if channel else [c.name for c in releases.list_channels(self.settings)]
        done = {}
        for name in names:
            pointer = releases.read_channel(self.settings, name)
            if pointer is None:
                raise ServiceError(
                    f"Nothing was ever deployed on channel '{name}'.",
                    next="python -m serving.deploy up --release data/release.json",
                )
            done[name] = self.up(pointer.release, name, self.settings.root)
        return {"channels": done}

    def down(self, channel: str | None) -> dict[str, Any]:
        """Stop the engine of a channel, or every recorded one. Channels keep pointing."""
        with self._alone():
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

    def _answers(self, channel: Channel) -> bool:
        """Whether a token comes out of the channel's engine, and it is the one on record."""
        record = read_record(self._record_path(channel.release))
        if record is None or not record.alive or record.url != channel.engine_url:
            return False
        return self._token(record) is None

    def _token(self, record: EngineRecord) -> str | None:
        """None when a token came out, else what is wrong."""
        try:
            probe.tokens_flow(record.url, record.model)
        except ServiceError as error:
            return error.what
        return None

    def _engine(self, installed: releases.Installed) -> tuple[EngineRecord, bool]:
        """A ready engine of that release, and whether it was started for this deployment."""
        path = self._record_path(installed.id)
        known = read_record(path)
        if known is not None:
            if known.alive and known.state == "ready" and self._token(known) is None:
                self.say(f"its engine already runs at {known.url}")
                return known, False
            self.say("stopping what is left of an earlier engine of this release")
            stop(known)
        self._end_unused(drain=False)  # a killed deployment's engine would share our cores
        return self._start(installed, path), True

    def _start(self, installed: releases.Installed, path: Path) -> EngineRecord:
        """Start an engine that outlives us and wait until tokens flow."""
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
                cwd=Path(__file__).resolve().parents[2],
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

    def _ask(self, installed: releases.Installed, engine: EngineRecord, prepared: Prepared) -> None:
        """One real question through index, prompt and engine. Raises when no token comes out."""
        self.say("asking it a question, end to end")
        answer = probe.chat(
            engine.url,
            engine.model,
            prepared.messages(),
            max_tokens=installed.answers.max_tokens,
            timeout=60.0,
        )
        if not (answer.get("usage") or {}).get("completion_tokens"):
            raise ServiceError("The engine gives no token to a real prompt.", where=engine.url)

    def _end_unused(self, wait: bool = False, drain: bool = True) -> None:
        """End engines that no channel points at; those that answer may finish first."""
        try:
            used = {c.engine_url for c in releases.list_channels(self.settings)}
        except RatchetError as error:  # its engine is unknown, and may be one that serves
            self.say(f"no engine is stopped: {error.what}")
            return
        unused = [r for r in list_records(self.settings.engines_dir) if r.url not in used]
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

    # -- small things ------------------------------------------------------------------------

    def _record_path(self, release_id: str) -> Path:
        return self.settings.engines_dir / f"{release_id}.json"

    def _result(self, channel: Channel, *, changed: bool, begun: float) -> dict[str, Any]:
        record = read_record(self._record_path(channel.release))
        return {
            "release": channel.release,
            "channel": channel.name,
            "changed": changed,
            "engine_url": channel.engine_url,
            "model": channel.model,
            "previous": channel.previous,
            "pid": record.pid if record else None,
            "log": record.log if record else None,
            "seconds": round(time.monotonic() - begun, 2),
        }

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One deployment at a time. The kernel drops the lock of a process that dies."""
        folder = self.settings.engines_dir
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".deploy.lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise ServiceError(
                    f"Another deployment is running (pid {stream.read().strip() or 'unknown'}).",
                    where=str(folder),
                    next="wait for it to end, then deploy again",
                ) from None
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield


def _previous(before: Channel | None, release_id: str) -> str | None:
    """The release to roll back to: bringing an engine back does not forget it."""
    if before is None:
        return None
    return before.previous if before.release == release_id else before.release


class Prepared:
    """The health check's question, retrieved and rendered in a thread while the engine starts."""

    def __init__(self, installed: releases.Installed, open_rag: OpenRag) -> None:
        self._installed, self._open_rag = installed, open_rag
        self._messages: list[dict[str, str]] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def messages(self) -> list[dict[str, str]]:
        """Wait for the messages. Raises what went wrong while they were made."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        return self._messages

    def _work(self) -> None:
        rag: Rag | None = None
        try:
            rag = self._open_rag(self._installed)
            passages = rag.retrieve(QUESTION)
            if not passages:
                raise ServiceError(
                    "The release's index finds nothing.",
                    where=str(self._installed.index),
                    next="rebuild it: `dvc repro index`",
                )
            self._messages = rag.messages(QUESTION, passages)
        except RatchetError as error:
            self._problem = error
        except Exception as error:  # the index library has errors of its own
            self._problem = ServiceError(
                f"The release's index cannot be searched: {type(error).__name__}: {error}",
                where=str(self._installed.index),
                next="rebuild it: `dvc repro index`",
            )
        finally:
            if rag is not None:
                rag.close()


def open_real_rag(installed: releases.Installed) -> Rag:
    """The release's retrieval and prompt, with no floor on the score."""
    from resources.embedding import open_embedder
    from resources.index import open_index

    embedder = open_embedder(installed.vectors, None, threads=1, device="cpu")
    return Rag(
        open_index(installed.index),
        embedder,
        installed.prompt(),
        top_k=installed.answers.top_k,
        min_score=-1.0,
        sentences=installed.answers.sentences,
    )
