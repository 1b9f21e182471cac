"""Show Dagster what ``dvc repro`` did in a terminal: ``sync`` and ``dvc_sync_sensor``.

In: the project's files and Dagster's event log. Out: runless events, wherever Dagster's verdict on
an asset differs from DVC's: a materialization carrying the lock's versions, an observation
carrying a source's hash. Nothing runs, and where both agree nothing is written.

What to write is decided by ``decide``, a pure function of two descriptions; the sensor only reads
both, calls it and reports.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
    NULL_EVENT_POINTER,
)

from .facts import result_metadata
from .manifest import ResolvedStage
from .project import DvcProject
from .provenance import (
    MISSING,
    by_asset,
    event_tags,
    instance_positions,
    source_tags,
)
from .state import State
from .translator import DagsterDvcTranslator

FULL_CHECK_S = 600.0  # compare even if no file has changed: events may have been wiped


@dataclass(frozen=True, order=True)
class Node:
    """One asset, or one partition of it."""

    key: dg.AssetKey
    partition: str | None = None


@dataclass(frozen=True)
class Recorded:
    """DVC's side of a node, from its files.

    Args:
        data_version: None where the lock has no entry.
        code_fresh: command, parameters and code are as locked.
        inputs: each upstream asset → whether what was consumed is what is there now.
    """

    data_version: str | None
    code_fresh: bool
    inputs: Mapping[dg.AssetKey, bool]


@dataclass(frozen=True)
class Seen:
    """Dagster's side of a node: its latest event.

    Args:
        data_version: that the event carries.
        code_version: that the event carries.
        inputs: each upstream asset → the versions that Dagster holds to be consumed, by
            partition (None for an unpartitioned one).
    """

    data_version: str | None
    code_version: str | None
    inputs: Mapping[dg.AssetKey, Mapping[str | None, str | None]]


@dataclass(frozen=True)
class Plan:
    """What to report, in this order: observations, then materializations, upstream first."""

    observe: Mapping[dg.AssetKey, str] = field(default_factory=dict)
    materialize: Mapping[Node, str] = field(default_factory=dict)  # with the reason


def decide(
    recorded: Mapping[Node, Recorded],
    seen: Mapping[Node, Seen],
    code_versions: Mapping[dg.AssetKey, str],
    sources: Mapping[dg.AssetKey, str],
    observed: Mapping[dg.AssetKey, str | None],
) -> Plan:
    """Where Dagster's verdict differs from DVC's.

    Args:
        recorded: DVC's side, upstream before downstream.
        seen: Dagster's side; nodes without any event are absent.
        code_versions: of each asset as the files say now.
        sources: each source → its version now.
        observed: each source → the version that Dagster saw last, None or absent if none.
    """
    versions: dict[dg.AssetKey, dict[str | None, str | None]] = {
        key: {None: version} for key, version in sources.items()
    }
    for node, one in recorded.items():
        versions.setdefault(node.key, {})[node.partition] = one.data_version or MISSING
    wanted = {
        node: why
        for node, one in recorded.items()
        if (why := _difference(one, seen.get(node), code_versions[node.key], versions))
    }
    return Plan(
        observe={key: v for key, v in sources.items() if observed.get(key) != v},
        materialize=wanted,
    )


def _difference(
    one: Recorded,
    seen: Seen | None,
    code_version: str,
    versions: Mapping[dg.AssetKey, Mapping[str | None, str | None]],
) -> str | None:
    """Why a node needs an event; None where Dagster agrees with DVC already."""
    if seen is None:
        return "not known to Dagster" if one.data_version is not None else None
    if (one.data_version or MISSING) != seen.data_version:
        return "other data" if one.data_version is not None else "no longer in dvc.lock"
    if one.data_version is None:
        return None
    if one.code_fresh != (seen.code_version == code_version):
        return "code version"
    if set(one.inputs) != set(seen.inputs):
        return "other inputs"
    for key, fresh in one.inputs.items():
        now = versions.get(key, {})
        consumed = seen.inputs[key]
        if fresh != all(now.get(part) == version for part, version in consumed.items()):
            return f"consumed another {key.to_user_string()}"
    return None


# -- reading both sides ----------------------------------------------------------------------------


class _Reader:
    """Reads both sides for ``decide``: DVC's from a State, Dagster's from an instance."""

    def __init__(
        self, state: State, translator: DagsterDvcTranslator, instance: dg.DagsterInstance
    ) -> None:
        self.state = state
        self.translator = translator
        self.instance = instance
        self.nodes = {
            Node(translator.get_asset_key(state.manifest.stages[one.asset]), one.key): one
            for one in state.nodes()
        }
        self.partitioned = {node.key for node in self.nodes if node.partition is not None}

    def recorded(self) -> dict[Node, Recorded]:
        return {node: self._one(raw) for node, raw in self.nodes.items()}

    def _one(self, raw: ResolvedStage) -> Recorded:
        verdict = self.state.verdict(raw)
        unread = by_asset(self.state.unread(raw), self.state, self.translator)
        grouped = by_asset(verdict.inputs, self.state, self.translator)
        fresh = {key: all(verdict.inputs[up] for up in ups) for key, ups in grouped.items()}
        return Recorded(
            data_version=verdict.data_version,
            code_fresh=verdict.code_fresh,
            inputs={**dict.fromkeys(unread, True), **fresh},
        )

    def code_versions(self) -> dict[dg.AssetKey, str]:
        return {
            self.translator.get_asset_key(stage): self.state.code_version(stage)
            for stage in self.state.manifest.stages.values()
        }

    def sources(self) -> dict[dg.AssetKey, str]:
        return {
            self.translator.get_source_key(path): self.state.source_version(path) or MISSING
            for path in self.state.sources
        }

    def observed(self) -> dict[dg.AssetKey, str | None]:
        found: dict[dg.AssetKey, str | None] = {}
        for path in self.state.sources:
            key = self.translator.get_source_key(path)
            record = self.instance.get_latest_data_version_record(key, is_source=True)
            tags = (record.event_log_entry.tags or {}) if record else {}
            found[key] = tags.get(DATA_VERSION_TAG)
        return found

    def seen(self) -> dict[Node, Seen]:
        found = {}
        for node, raw in self.nodes.items():
            record = self.instance.get_latest_data_version_record(
                node.key, is_source=False, partition_key=node.partition
            )
            if record is not None:
                tags = record.event_log_entry.tags or {}
                read = by_asset(self.state.upstreams(raw), self.state, self.translator)
                found[node] = self._seen(tags, read)
        return found

    def _seen(self, tags: Mapping[str, str], upstreams: Mapping[dg.AssetKey, list[Any]]) -> Seen:
        inputs: dict[dg.AssetKey, dict[str | None, str | None]] = {}
        for name, value in tags.items():
            if not name.startswith(f"{INPUT_DATA_VERSION_TAG_PREFIX}/"):
                continue
            user_string = name.removeprefix(f"{INPUT_DATA_VERSION_TAG_PREFIX}/")
            key = dg.AssetKey.from_user_string(user_string)
            if key in self.partitioned:
                partitions = [up.key for up in upstreams.get(key, []) if up.key is not None]
                pointer = tags.get(f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{user_string}", "")
                inputs[key] = {part: self._at(key, part, pointer) for part in partitions}
            else:
                inputs[key] = {None: value}
        return Seen(tags.get(DATA_VERSION_TAG), tags.get(CODE_VERSION_TAG), inputs)

    def _at(self, key: dg.AssetKey, partition: str, pointer: str) -> str | None:
        """The version that a partition had at a position of the event log, as Dagster reads it."""
        position = None if pointer in ("", NULL_EVENT_POINTER) else int(pointer)
        record = self.instance.get_latest_data_version_record(
            key,
            is_source=False,
            partition_key=partition,
            before_cursor=position + 1 if position else None,
        )
        return (record.event_log_entry.tags or {}).get(DATA_VERSION_TAG) if record else None


# -- reporting -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synced:
    """What ``sync`` reported.

    Args:
        observed: sources, by user string of their key.
        materialized: nodes → why.
        left_out: nodes that a running stage is about to change.
    """

    observed: tuple[str, ...]
    materialized: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.observed and not self.materialized:
            return "Dagster and DVC agree."
        said = [f"{name} ({why})" for name, why in self.materialized.items()]
        said += [f"{name} (source)" for name in self.observed]
        return "Recorded from dvc.lock: " + ", ".join(said)


def sync(
    project: DvcProject,
    instance: dg.DagsterInstance,
    translator: DagsterDvcTranslator | None = None,
) -> Synced:
    """Report runless events until Dagster's staleness agrees with DVC's. Runs nothing.

    A stage that runs at this moment is left out: its own event follows.
    """
    translator = translator or DagsterDvcTranslator()
    state = project.state(translator.is_code_of(project))
    reader = _Reader(state, translator, instance)
    plan = decide(
        reader.recorded(),
        reader.seen(),
        reader.code_versions(),
        reader.sources(),
        reader.observed(),
    )
    for key, version in plan.observe.items():
        instance.report_runless_asset_event(
            dg.AssetObservation(asset_key=key, tags=source_tags(version))
        )
    running = running_stage(project)
    positions = instance_positions(instance)
    done: dict[str, str] = {}
    left_out = []
    for node, why in plan.materialize.items():
        raw = reader.nodes[node]
        if raw.name == running:
            left_out.append(raw.name)
            continue
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                asset_key=node.key,
                partition=node.partition,
                metadata={
                    **result_metadata(project, state, raw),
                    "dvc/how": "synced",
                    "dvc/why": why,
                },
                tags=event_tags(state, raw, translator, positions),
            )
        )
        done[raw.name] = why
    observed = tuple(key.to_user_string() for key in plan.observe)
    return Synced(observed, done, tuple(left_out))


def running_stage(project: DvcProject) -> str | None:
    """The stage that some process of this package is running in the checkout, if any."""
    try:
        descriptor = os.open(project.work_dir / "lock", os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        try:
            return str(json.loads(os.pread(descriptor, 4096, 0))["stage"])
        except (ValueError, KeyError):
            return None
    finally:
        os.close(descriptor)


def fingerprint(state: State) -> str:
    """Changes whenever DVC's side may have: lock, stages, code or sources."""
    codes = {name: state.code_version(stage) for name, stage in state.manifest.stages.items()}
    sources = {path: state.source_version(path) for path in state.sources}
    lock = {name: repr(entry) for name, entry in state.lock.items()}
    text = json.dumps([state.manifest.identity, codes, sources, lock], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def due(cursor: str | None, mark: str, now: float) -> bool:
    """Whether a tick has to compare: something changed, or the last full check is long ago."""
    try:
        last = json.loads(cursor or "{}")
        return bool(last.get("mark") != mark or now - float(last["at"]) > FULL_CHECK_S)
    except (ValueError, KeyError, TypeError):
        return True


def dvc_sync_sensor(
    project: DvcProject,
    translator: DagsterDvcTranslator | None = None,
    *,
    name: str = "dvc_sync",
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """A sensor that shows Dagster what happened to ``dvc.lock`` and the sources outside of it.

    A tick hashes the lock and the sources (milliseconds; large files are remembered) and compares
    with Dagster's events only if something changed. It starts no runs.

    Args:
        project: the checkout.
        translator: the one that was given to ``dvc_assets``.
        name: the sensor's name.
        minimum_interval_seconds: between two ticks.
        default_status: running unless said otherwise.
    """
    chosen = translator or DagsterDvcTranslator()
    is_code = chosen.is_code_of(project)

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now = time.time()
        mark = fingerprint(project.state(is_code))
        if not due(context.cursor, mark, now):
            return dg.SensorResult(skip_reason="Nothing has changed.", cursor=context.cursor)
        done = sync(project, context.instance, chosen)
        cursor = context.cursor if done.left_out else json.dumps({"mark": mark, "at": now})
        return dg.SensorResult(skip_reason=str(done), cursor=cursor)

    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description="Records what `dvc repro` did in a terminal: assets look as DVC sees them.",
    )
