"""What tests of rollouts share: engines that are lines of a file, and a log of any answers."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import ServiceError
from contracts.records import Channel, RequestRecord
from contracts.settings import ROOT, Settings
from resources import releases
from resources.ledger import Ledger
from resources.request_writer import DayWriter
from resources.requests import new_response_id
from serving.rollout.controller import Controller
from serving.rollout.engines import Engine
from serving.rollout.policy import Policy
from tests.serving.factory import build, chunk

#: Seen in a second of test traffic: steps of a few answers, wide margins, no patience needed.
QUICK: dict[str, Any] = {
    "canary": [{"share": 0.2, "answers": 10}, {"share": 0.5, "answers": 40}],
    "ab": {"share": 0.5, "answers": 40},
    "shadow": {"share": 0.9, "answers": 40},
    "blue_green": {"share": 1.0, "answers": 40},
    "reference": 20,
    "metrics": {
        "errors": {"margin": 0.2}, "ttft": {"margin": 0.4}, "cost": {"margin": 0.4},
        "refusals": {"margin": 0.4}, "quality": {"margin": 0.3},
    },
}  # fmt: skip
#: What a good answer says, word for word out of the first passage.
GOOD = "Fact 1 of one [1]"


def quick(**changes: Any) -> Policy:
    return Policy.model_validate({**QUICK, **changes})


def install(settings: Settings, mark: str) -> str:
    """An installed release; see :func:`releasable`."""
    root = settings.root / mark
    return releases.install(releasable(root, mark), root, settings).name


def releasable(root: Path, mark: str) -> Path:
    """The file of a release whose chunks can be read, so that its answers can be scored. All have
    the same chunks."""
    build(root, mark)
    rows = [chunk(n, f"Fact {n} of ", "one").model_dump() for n in (1, 2, 3, 4)]
    table = {name: [row[name] for row in rows] for name in ("chunk_id", "text")}
    pq.write_table(pa.table(table), root / "data" / "chunks.parquet")
    return _again(root)


def _again(root: Path) -> Path:
    """The release file once more, after its chunks were changed."""
    from contracts.digests import path_md5, path_size
    from contracts.records import Release

    path = root / "data" / "release.json"
    body = json.loads(path.read_text())
    chunks = root / "data" / "chunks.parquet"
    body["members"]["chunks"] |= {"md5": path_md5(chunks), "size": path_size(chunks)}
    body["id"] = Release.compute_id(body)
    path.write_text(json.dumps(body))
    return path


def deployed(settings: Settings, release: str, url: str = "http://stable") -> None:
    """The channel serves that release; the ledger adopts it at the first command."""
    approval_policy(settings)
    releases.write_channel(
        settings, Channel(name="stable", release=release, engine_url=url, model="nano")
    )


def approval_policy(settings: Settings) -> None:
    """The repository's, which every checkout has."""
    folder = settings.root / "data" / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data" / "policies" / "approval.yaml", folder)


class FileEngines:
    """Engines as lines of a file that outlives whoever writes it.

    Args:
        urls: where the engine of a release answers; others get an address that is none.
    """

    def __init__(self, settings: Settings, urls: dict[str, str] | None = None) -> None:
        self._path = settings.state_dir / "engines.txt"
        self._settings, self._urls = settings, urls or {}
        self.fails = False

    def start(self, release: str) -> Engine:
        if self.fails:
            raise ServiceError("It does not come up.")
        if release not in self.running():
            self._write({*self.running(), release})
        return Engine(self._url(release), "nano")

    def alive(self, release: str, url: str) -> bool:
        return release in self.running() and url == self._url(release)

    def retire(self) -> None:
        used = set()
        for channel in releases.list_channels(self._settings):
            used |= {channel.release}
            used |= {channel.candidate.release} if channel.candidate else set()
        if self.running() - used:
            self._write(self.running() & used)

    def kill(self, release: str) -> None:
        self._write(self.running() - {release})

    def running(self) -> set[str]:
        return set(self._path.read_text().split()) if self._path.exists() else set()

    def _url(self, release: str) -> str:
        return self._urls.get(release, f"http://{release}")

    def _write(self, found: set[str]) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(" ".join(sorted(found)))
        os.replace(part, self._path)


class Traffic:
    """Rows as the gateway would write them, for a channel as it stands."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._writer = DayWriter(settings.requests_dir, idle_s=3600, age_s=3600)
        self._n = 0

    def answers(self, count: int, *, share: float | None = None, **candidate: Any) -> None:
        """So many requests; of each arm in turn, by the channel's share. ``candidate`` are fields
        of its rows that are other than those of the stable release."""
        channel = releases.read_channel(self.settings, "stable")
        assert channel is not None
        tried = channel.candidate
        part = tried.share if tried and share is None else share or 0.0
        rows = []
        for _ in range(count):
            self._n += 1
            mine = tried is not None and int(self._n * part) > int((self._n - 1) * part)
            if tried is None or not mine:
                arm = "stable" if tried else ""
                rows.append(self._row(channel.release, arm, tried.rollout if tried else ""))
                continue
            row = self._row(tried.release, "candidate", tried.rollout)
            rows.append(row | candidate)
        self._writer.append(rows)

    def roll(self) -> None:
        """The journal becomes Parquet."""
        self._writer.roll()

    def _row(self, release: str, arm: str, rollout: str) -> dict[str, Any]:
        now = datetime.now(UTC)
        return RequestRecord(
            response_id=new_response_id(now),
            time=now.isoformat(timespec="milliseconds")[:-6] + "Z",
            channel="stable", release=release, model="nano", prompt_version="answer/v1",
            question="q", answer=GOOD, refused=False, stream=False, status=200, error=None,
            chunk_ids=[chunk(1, "Fact 1 of ", "one").chunk_id], cited=[1], scores=[0.9],
            prompt_tokens=50, completion_tokens=10, ttft_ms=100.0 + self._n % 10,
            latency_ms=200.0, retrieval_ms=1.0, tenant="t", arm=arm, rollout=rollout,
        ).model_dump()  # fmt: skip


def controller(settings: Settings, engines: FileEngines) -> Controller:
    """A new one, as another process would have it."""
    return Controller(settings, "stable", engines, Ledger.open(settings))
