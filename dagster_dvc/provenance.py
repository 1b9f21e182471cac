"""DVC's record of a run as the tags by which Dagster judges staleness.

In: a ``State``, a node, the instance's event positions. Out: event tags. Why: Dagster writes the
*latest known* versions of the inputs on a materialization, which is wrong whenever somebody ran
``dvc repro`` in a terminal meanwhile; ``dvc.lock`` has the versions that were really consumed. A
step's own tags win over Dagster's, so every event carries the lock's truth.

For a partitioned upstream Dagster does not compare versions but positions: has any partition got
a new version after the recorded position? A position before everything says "yes".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import dagster as dg
from dagster._core.definitions.data_version import (  # no public names for these tags
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    NULL_EVENT_POINTER,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from .manifest import ResolvedStage
from .state import State, Upstream, digest
from .translator import DagsterDvcTranslator

BEFORE_EVERYTHING = "-2"  # Dagster looks before position + 1, and takes 0 for "no limit"
MISSING = "missing"  # the version of a source that is not there


class Positions(Protocol):
    """Where each asset's latest event stands in the event log; None where it has none."""

    def __call__(self, key: dg.AssetKey) -> int | None: ...


def instance_positions(instance: dg.DagsterInstance) -> Positions:
    """Positions as an instance has them now, one query per asset."""

    def latest(key: dg.AssetKey) -> int | None:
        records = instance.get_asset_records([key])
        if not records:
            return None
        entry = records[0].asset_entry
        found = entry.last_materialization_record or entry.last_observation_record
        if found is None:
            seen = instance.fetch_observations(key, limit=1).records
            found = seen[0] if seen else None
        return found.storage_id if found else None

    return latest


def upstream_key(upstream: Upstream, state: State, translator: DagsterDvcTranslator) -> dg.AssetKey:
    """The asset key of something that a stage reads."""
    if upstream.source is not None:
        return translator.get_source_key(upstream.source)
    return translator.get_asset_key(state.manifest.stages[str(upstream.asset)])


def by_asset(
    upstreams: Iterable[Upstream], state: State, translator: DagsterDvcTranslator
) -> dict[dg.AssetKey, list[Upstream]]:
    """Group what a stage reads by asset: partitions of one asset come together."""
    found: dict[dg.AssetKey, list[Upstream]] = {}
    for upstream in upstreams:
        found.setdefault(upstream_key(upstream, state, translator), []).append(upstream)
    return found


def current_version(upstream: Upstream, state: State) -> str:
    """The version that something has now (``missing`` where it has none)."""
    if upstream.source is not None:
        return state.source_version(upstream.source) or MISSING
    node = state.manifest.node(str(upstream.asset), upstream.key)
    return state.data_version(node) or MISSING


def source_tags(version: str) -> dict[str, str]:
    """Tags of an observation of a source."""
    return {DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}


def event_tags(
    state: State,
    node: ResolvedStage,
    translator: DagsterDvcTranslator,
    positions: Positions,
) -> dict[str, str]:
    """The tags of a materialization of ``node``, from the lock alone.

    An input whose version now is the one that was consumed gets that version, and so does one that
    only other partitions read; any other gets one that differs from every real version, so that
    Dagster shows the asset as stale.
    """
    verdict = state.verdict(node)
    read = by_asset(verdict.inputs, state, translator)
    unread = by_asset(state.unread(node), state, translator)
    tags = {
        CODE_VERSION_TAG: state.recorded_code_version(node),
        DATA_VERSION_TAG: verdict.data_version or MISSING,
        DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
    }
    for key, group in {**unread, **read}.items():
        fresh = all(verdict.inputs.get(upstream, True) for upstream in group)
        position = positions(key)
        tags[get_input_data_version_tag(key)] = _consumed(group, fresh, node, state)
        if group[0].key is not None and not fresh:
            tags[get_input_event_pointer_tag(key)] = BEFORE_EVERYTHING
        else:
            pointer = NULL_EVENT_POINTER if position is None else str(position)
            tags[get_input_event_pointer_tag(key)] = pointer
    return tags


def _consumed(group: list[Upstream], fresh: bool, node: ResolvedStage, state: State) -> str:
    versions = [current_version(upstream, state) for upstream in group]
    if fresh:
        return versions[0] if group[0].key is None else digest(versions)
    locked = state.lock.get(node.name)
    seen = {path: file.md5 for path, file in locked.deps.items()} if locked else {}
    if group[0].source is not None:  # the md5 that was read tells more than a digest
        lock_path = state.sources[group[0].source].lock_path
        return seen.get(lock_path, MISSING)
    return f"other-{digest(seen)}"
