"""What a channel serves right now: one release's index, prompt and engine, switched as a whole.

In: the channel's pointer file, looked at every half second. Out: ``current``, an immutable Live,
and ``trial``, the candidate of a rollout. A new release is opened and warmed before either moves,
so no request waits for it; a request takes one of them once and keeps it to its end, so nothing is
ever mixed. When the new release cannot be opened, the old one keeps serving and ``problem`` says
why. A candidate is let go of before anything else is done: taking it back opens nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracts.errors import RatchetError
from contracts.params import Vectors
from contracts.records import Candidate, Channel
from contracts.settings import Settings
from resources import releases
from resources.prompts import Prompts
from resources.published_reader import Tombstones
from resources.rag import Embeds, Rag
from serving.gateway.metrics import Metrics
from serving.gateway.split import Trial, candidate_route

log = logging.getLogger("ratchet.gateway.live")
POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Live:
    """One release with everything opened."""

    channel: Channel
    installed: releases.Installed
    rag: Rag
    max_tokens: int
    prompts: Prompts  # every version that the release holds; rag.prompt is the one it names
    hidden: Tombstones | None = None  # of its documents; what ``rag`` leaves out

    async def target(self) -> str:
        """What answers, for the cache: the release, and what is hidden of its documents by now."""
        hidden = self.hidden
        if hidden is None:
            return self.release
        digest = hidden.known_digest()
        if digest is None:
            digest = await asyncio.to_thread(hidden.digest)
        return f"{self.release}+{digest}" if digest else self.release

    @property
    def release(self) -> str:
        return self.installed.id

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the model's tokenizer, where the bundle has one."""
        folder = self.installed.bundle / "checkpoint"
        return folder if (folder / "tokenizer.json").is_file() else None

    @property
    def prompt_version(self) -> str:
        prompt = self.rag.prompt
        return f"{prompt.name}/{prompt.version}"


#: Opens the release that a channel points at. Blocks; runs in a thread.
Opener = Callable[[Channel], Live]


def opener(settings: Settings, make_embedder: Callable[[Vectors], Embeds] | None = None) -> Opener:
    """The real opener. Embedders are shared between releases that use the same model."""
    embedders: dict[Vectors, Embeds] = {}

    def embedder_of(vectors: Vectors) -> Embeds:
        if vectors not in embedders:
            embedders[vectors] = (make_embedder or _embedder)(vectors)
        return embedders[vectors]

    def open_live(channel: Channel) -> Live:
        from resources.index import open_index

        installed = releases.load(settings, channel.release)
        answers = installed.answers
        embedder = embedder_of(installed.vectors)
        hidden = Tombstones(settings, installed.index)
        rag = Rag(
            open_index(installed.index),
            embedder,
            installed.prompt(),
            top_k=answers.top_k,
            min_score=answers.min_score,
            sentences=answers.sentences,
            only=hidden,
        )
        rag.messages("ready?", rag.retrieve("ready?"))  # weights, index pages and template are warm
        # Closed when the last request that uses it is done, so that its files do not pile up.
        weakref.finalize(rag, rag.index.close)  # type: ignore[attr-defined]
        return Live(channel, installed, rag, answers.max_tokens, installed.prompts(), hidden)

    return open_live


def _embedder(vectors: Vectors) -> Embeds:
    """One thread: the engine needs the cores. No cache: questions are people's words."""
    from resources.embedding import open_embedder

    return open_embedder(vectors, None, threads=1, device="cpu")


class LiveRelease:
    """Watches one channel.

    Args:
        settings: where the pointer stands.
        channel: its name.
        open_live: what opens a release; blocking.
        metrics: told what is served.
    """

    def __init__(
        self, settings: Settings, channel: str, open_live: Opener, metrics: Metrics
    ) -> None:
        self.settings, self.channel = settings, channel
        self.current: Live | None = None
        self.trial: Trial | None = None
        self.problem: str | None = "the channel was not looked at yet"
        self.switched = asyncio.Event()  # set at every switch; the prober waits on it
        self.looked = asyncio.Event()  # set when the first look has ended, whatever came of it
        self.let_go: Callable[[str], None] = lambda name: None  # told of a candidate's route
        self._open, self._metrics = open_live, metrics
        self._seen: Any = object()
        self._failed_at = 0.0
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "open-release")

    async def watch(self) -> None:
        """Look for ever; run as a task."""
        while True:
            try:
                await self.refresh()
            except Exception:  # a bug here must not freeze the gateway on an old release
                log.exception("looking at channel %s failed", self.channel)
            await asyncio.sleep(POLL_SECONDS)

    async def refresh(self) -> bool:
        """Look at the pointer now; say whether another release (or engine) is served since."""
        async with self._lock:
            signature = self._signature()
            waiting = self._failed_at and time.monotonic() - self._failed_at < RETRY_SECONDS
            if signature == self._seen and (not self._failed_at or waiting):
                return False
            before = self.current, self.trial
            self._seen = signature
            try:
                await self._load()
            finally:
                self.looked.set()
            return (self.current, self.trial) != before

    async def now(self, seconds: float) -> Live | None:
        """What is served; right after the start, wait until the first release is open."""
        if self.current is None and not self.looked.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.looked.wait()
        return self.current

    @property
    def idle(self) -> bool:
        """Whether nothing is deployed on the channel, which was looked at."""
        return self.current is None and self.looked.is_set() and not self._failed_at

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        self._failed_at = 0.0
        try:
            channel = releases.read_channel(self.settings, self.channel)
            if channel is None:
                self._try(None)
                self._switch(None, f"nothing is deployed on channel '{self.channel}' yet")
                return
            stable = channel.model_copy(update={"candidate": None})
            before, wanted = self.trial, channel.candidate
            if before is not None and (wanted is None or not _same(before.candidate, wanted)):
                self._try(None)
            if self.current is None or stable != self.current.channel:
                live = before.live if before and _same(before.candidate, stable) else None
                self._switch(
                    replace(live, channel=stable) if live else await self._opened(stable), None
                )
            self.looked.set()  # nobody waits for a candidate
            if wanted is not None:
                await self._load_candidate(wanted)
        except (RatchetError, OSError) as error:
            self._fail(str(error))
        except Exception as error:  # the index library can raise anything of its own
            log.exception("release cannot be opened")
            self._fail(f"{type(error).__name__}: {error}")

    async def _load_candidate(self, wanted: Candidate) -> None:
        """Open it, if it is another one; take its share in any case."""
        live = self.trial.live if self.trial is not None else None
        if live is None:
            pointer = Channel(
                name=self.channel, release=wanted.release, engine_url=wanted.engine_url,
                model=wanted.model,
            )  # fmt: skip
            try:
                live = await self._opened(pointer)
            except BaseException:
                self._try(Trial(wanted, None))
                raise
            now = releases.read_channel(self.settings, self.channel)
            if now is None or now.candidate != wanted:  # it took seconds
                self._seen = None
                return
        self._try(Trial(wanted, live))

    async def _opened(self, channel: Channel) -> Live:
        loop = asyncio.get_running_loop()
        live = await loop.run_in_executor(self._thread, self._open, channel)
        # A pointer that was moved by hand: the last certified release stays.
        releases.certified(live.installed.release, str(live.installed.path))
        return live

    def _try(self, trial: Trial | None) -> None:
        if trial != self.trial:
            said = trial and f"{trial.candidate.release} tried at {trial.candidate.share:g}"
            log.info("channel %s: %s", self.channel, said or "no candidate any more")
        if trial is None and self.trial is not None:
            self.let_go(candidate_route(self.channel))
        self.trial = trial
        self._metrics.trying(self.channel, trial.candidate if trial else None)

    def _switch(self, live: Live | None, problem: str | None) -> None:
        self.current, self.problem = live, problem
        if live is None:
            self._metrics.release.clear()
            return
        log.info("channel %s serves release %s", self.channel, live.release)
        self._metrics.serving(self.channel, live.release, live.channel.model, live.prompt_version)
        self.switched.set()

    def _fail(self, problem: str) -> None:
        self._failed_at = time.monotonic()
        self.problem = f"the release on channel '{self.channel}' cannot be opened: {problem}"
        log.error("%s", self.problem)

    def _signature(self) -> Any:
        """Of the pointer file; changes with every flip."""
        with contextlib.suppress(OSError):
            stat = releases.channel_path(self.settings, self.channel).stat()
            return stat.st_ino, stat.st_mtime_ns, stat.st_size
        return None


def _same(one: Candidate, other: Candidate | Channel) -> bool:
    """Whether both are the same release on the same engine."""
    return (one.release, one.engine_url, one.model) == (
        other.release, other.engine_url, other.model,
    )  # fmt: skip
