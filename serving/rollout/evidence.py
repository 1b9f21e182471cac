"""Rows of the request log as they come: of a channel, since a moment, while it is being written.

A row is in the gateway's journal about 20 ms after its answer ended. :class:`Tail` reads what was
added since it last looked; a new one reads everything again and comes to the same counts, because
nothing that is kept here cannot be had from the log. A journal becomes Parquet with its rows in
their order, so how many of a file's rows were read holds for both.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import RatchetError
from contracts.records import RequestRecord
from contracts.settings import Settings
from resources import releases
from resources.requests import parquet_of
from resources.scorers.live import score_row
from serving.rollout.arms import Arm, Reference, Scorer
from serving.rollout.policy import Policy

COLUMNS = (
    "response_id", "time", "channel", "release", "question", "answer", "refused", "status", "error",
    "chunk_ids", "cited", "prompt_tokens", "completion_tokens", "ttft_ms", "latency_ms", "kind",
    "tenant", "session", "cost", "cached", "rollout", "arm",
)  # fmt: skip
Row = dict[str, Any]
log = logging.getLogger("ratchet.rollout.evidence")


class Tail:
    """Reads on from where it was.

    Args:
        folder: ``Settings.requests_dir``.
        since: RFC 3339; rows of requests that arrived earlier are passed over.
    """

    def __init__(self, folder: Path, since: str) -> None:
        self._folder, self._since = folder, since
        # A row is appended after its request arrived, so an older file has none that is wanted. A
        # minute, for clocks of a file server.
        self._oldest = datetime.fromisoformat(since).timestamp() - 60
        self._read: dict[str, int] = {}  # rows by file, whole ones
        self._offset: dict[str, int] = {}  # bytes by journal

    def rows(self, want: Callable[[Row], bool]) -> list[Row]:
        """New rows that are wanted, file by file in their order."""
        found: list[Row] = []
        for home in _days(self._folder, self._since[:10]):
            # Journals first: one that vanishes before it is opened is Parquet by then.
            for journal in sorted(home.glob(".*.jsonl")):
                with contextlib.suppress(FileNotFoundError):
                    found += self._journal(journal)
            for path in sorted(home.glob("[!.]*.parquet")):
                found += self._parquet(path)
        return [row for row in found if row["time"] >= self._since and want(row)]

    def _journal(self, path: Path) -> list[Row]:
        key = parquet_of(path).as_posix()
        with path.open("rb") as stream:
            stream.seek(self._offset.get(key, 0))
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may still be written
        rows = list(_parsed(whole))
        self._offset[key] = self._offset.get(key, 0) + len(whole)
        self._read[key] = self._read.get(key, 0) + len(rows)
        return rows

    def _parquet(self, path: Path) -> list[Row]:
        key = path.as_posix()
        done = self._read.get(key, 0)
        if self._offset.get(key) == -1:
            return []
        if not done and path.stat().st_mtime < self._oldest:
            self._offset[key] = -1
            return []
        table = _table(path)
        self._offset[key] = -1  # it will not grow
        self._read[key] = len(table)
        return table[done:]


class Evidence:
    """Both arms of one step, counted up as rows come.

    Args:
        channel, rollout: whose rows.
        stable, candidate: their releases.
        since: when the step began, RFC 3339.
        bounds: fixed for the rollout.
        history: rows that the stable arm has besides: of blue-green, from before the step.
    """

    def __init__(
        self, settings: Settings, *, channel: str, rollout: str, stable: str, candidate: str,
        since: str, policy: Policy, bounds: Reference, history: list[Row],
    ) -> None:  # fmt: skip
        self._tail = Tail(settings.requests_dir, since)
        self._want = (channel, rollout)
        self._names = {False: stable, True: candidate}
        self._policy, self._bounds = policy, bounds
        self._scorers = {name: scorer(settings, name) for name in (stable, candidate)}
        self.stable, self.candidate = Arm(), Arm(candidate=True)
        for row in history:
            self._add(self.stable, row)

    def refresh(self) -> None:
        """Count what came since."""
        for row in self._tail.rows(lambda row: (row["channel"], row["rollout"]) == self._want):
            if row["arm"]:
                self._add(self.stable if row["arm"] == "stable" else self.candidate, row)

    def _add(self, arm: Arm, row: Row) -> None:
        wanted = self._names[arm.candidate]
        # Another release answered for it: its engine could not be reached.
        failed = bool(row["release"]) and row["release"] != wanted
        arm.add(row, failed, self._policy, self._bounds, self._scorers[wanted])


def scorer(settings: Settings, release: str) -> Scorer:
    """Quality of an answer of that release: the mean of its deterministic scores. None where one
    of them is INVALID, or the release's chunks cannot be read."""
    texts: Mapping[str, str] | None = None

    def score(row: Mapping[str, Any]) -> float | None:
        nonlocal texts
        if texts is None:
            texts = _texts(settings, release)
        values = [s.value for s in score_row(row, texts) if s.metric != "refusal"]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return score


def _texts(settings: Settings, release: str) -> Mapping[str, str]:
    """Chunk id -> text of an installed release."""
    try:
        table = pq.read_table(releases.load(settings, release).chunks, columns=["chunk_id", "text"])
    except (RatchetError, OSError, pa.ArrowException) as error:
        log.warning("answers of release %s cannot be scored: %s", release, error)
        return {}
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def latest(
    folder: Path, want: Callable[[Row], bool], most: int, before: str | None = None
) -> list[Row]:
    """The newest wanted rows of today and yesterday, newest file first, ``most`` at most.

    Args:
        before: RFC 3339; only requests that arrived earlier.
    """
    found: list[Row] = []
    first = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    for home in reversed(_days(folder, first)):
        stems: dict[str, Path] = {p.name: p for p in home.glob("[!.]*.parquet")}
        for journal in home.glob(".*.jsonl"):
            stems.setdefault(parquet_of(journal).name, journal)
        for name in sorted(stems, reverse=True):
            path = stems[name]
            try:
                rows = _table(path) if path.suffix == ".parquet" else _parsed(path.read_bytes())
            except FileNotFoundError:  # rolled just now
                rows = _table(parquet_of(path))
            wanted = [row for row in rows if want(row) and (before is None or row["time"] < before)]
            found += reversed(wanted)
            if len(found) >= most:
                return found[:most]
    return found


def _days(folder: Path, first: str) -> list[Path]:
    """Folders of that UTC day and later ones."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if p.name >= first and _is_day(p.name))
    return []


def _is_day(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(date.fromisoformat(name))
    return False


def _parsed(lines: bytes) -> Iterator[Row]:
    for line in lines.split(b"\n"):
        with contextlib.suppress(orjson.JSONDecodeError):  # torn by a kill or a full disk
            if line:
                yield _whole(orjson.loads(line))


def _table(path: Path) -> list[Row]:
    names = [name for name in COLUMNS if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=names, partitioning=None)
    return [_whole(row) for row in table.to_pylist()]


def _whole(row: Row) -> Row:
    """With every column; those that an older gateway did not write have their defaults."""
    return {
        name: row[name] if name in row else RequestRecord.model_fields[name].default
        for name in COLUMNS
    }
