"""Stages as Dagster assets: ``dvc_assets``.

In: a project, a translator, a runner. Out: one asset per stage (partitioned where the stage is a
``foreach`` or ``matrix``) and observable source assets for what stages read and none makes.
Materializing an asset brings exactly one stage up to date through the runner; the event carries
what ``dvc.lock`` says afterwards.
"""

# No `from __future__ import annotations`: Dagster inspects the annotation of `context`.
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from . import check
from .errors import DagsterDvcError, InvalidProject, StageFailed
from .facts import result_metadata
from .manifest import ResolvedStage, Stage
from .process import Emit
from .project import DvcProject
from .provenance import (
    MISSING,
    by_asset,
    event_tags,
    instance_positions,
    source_tags,
    upstream_key,
)
from .runner import LocalRunner, StageRequest, StageResult, StageRunner, command_text
from .state import State, Upstream
from .translator import DagsterDvcTranslator

LOGGED_LINES = 1000  # of one stage in Dagster's event log; stdout has all of them

RUN_ID, PARTITION, STAGE = "DAGSTER_DVC_RUN_ID", "DAGSTER_DVC_PARTITION", "DAGSTER_DVC_STAGE"


def dvc_assets(
    project: DvcProject,
    translator: DagsterDvcTranslator | None = None,
    runner: StageRunner | None = None,
    *,
    runners: Mapping[str, StageRunner] | None = None,
) -> list[dg.AssetsDefinition]:
    """Every stage of the project's ``dvc.yaml`` as an asset, and its sources.

    Args:
        project: the checkout.
        translator: decides names, groups, owners … of the assets.
        runner: runs the stages; by default as processes in the checkout.
        runners: more runners by name, for the stages whose ``meta.dagster.runner`` names one.

    Returns:
        One asset per stage in file order, then (if there are any) one definition that observes
        all sources and can observe some of them.

    Raises:
        InvalidProject: lists everything in ``dvc.yaml`` that cannot be shown as an asset.
        ResolveFailed: DVC cannot read ``dvc.yaml``.
    """
    translator = translator or DagsterDvcTranslator()
    runner = runner or LocalRunner()
    state = project.state(translator.is_code_of(project))
    built: dict[str, dg.AssetsDefinition] = {}

    def make(stage: Stage) -> None:
        name = translator.get_runner_name(stage)
        if name is not None and name not in (runners or {}):
            there = ", ".join(runners or {}) or "none"
            raise ValueError(f"no runner is named {name!r}; dvc_assets was given: {there}")
        chosen = runner if name is None else (runners or {})[name]
        built[stage.name] = _stage_asset(stage, state, project, translator, chosen)

    offences = check.offences(state, translator, make)
    if offences:
        raise InvalidProject(offences)
    for warning in check.warnings(state):
        logging.getLogger("dagster_dvc").warning(warning)
    found = list(built.values())
    if state.sources:
        found.append(_observable_sources(state, project, translator))
    return found


# -- what an asset is ------------------------------------------------------------------------------


def partition_mapping(
    stage: Stage, upstream: Stage, pairs: set[tuple[str | None, str | None]]
) -> dg.PartitionMapping | None:
    """Which partitions of ``upstream`` a partition of ``stage`` reads.

    Args:
        pairs: (key of ``stage``, key of ``upstream``), None standing for "no partitions".
    """
    if not upstream.partitioned:
        return None
    read = {up for _, up in pairs}
    everything = read == set(upstream.keys)
    if not stage.partitioned:
        if everything:
            return dg.AllPartitionMapping()
        return dg.SpecificPartitionsPartitionMapping([up for up in upstream.keys if up in read])
    if all(down == up for down, up in pairs) and set(stage.keys) == set(upstream.keys):
        return dg.IdentityPartitionMapping()
    if len(pairs) == len(stage.keys) * len(upstream.keys):
        return dg.AllPartitionMapping()
    table = {
        up: {str(down) for down, other in pairs if other == up}
        for up in upstream.keys
        if up in read
    }
    return dg.StaticPartitionMapping(table)


def _deps(stage: Stage, state: State, translator: DagsterDvcTranslator) -> list[dg.AssetDep]:
    pairs: dict[Upstream, set[tuple[str | None, str | None]]] = {}
    for key, node in stage.resolved.items():
        for upstream in state.upstreams(node):
            whole = Upstream(asset=upstream.asset, source=upstream.source)
            pairs.setdefault(whole, set()).add((key, upstream.key))
    found = []
    for whole, of in pairs.items():
        mapping = None
        if whole.asset is not None:
            mapping = partition_mapping(stage, state.manifest.stages[whole.asset], of)
        found.append(dg.AssetDep(upstream_key(whole, state, translator), partition_mapping=mapping))
    return found


def asset_spec(stage: Stage, state: State, translator: DagsterDvcTranslator) -> dg.AssetSpec:
    """The spec of a stage's asset, every attribute by the translator."""
    return dg.AssetSpec(
        key=translator.get_asset_key(stage),
        deps=_deps(stage, state, translator),
        description=translator.get_description(stage),
        group_name=translator.get_group_name(stage),
        owners=translator.get_owners(stage),
        kinds=translator.get_kinds(stage),
        tags=translator.get_tags(stage),
        metadata=translator.get_metadata(stage),
        code_version=translator.get_code_version(stage, state),
        partitions_def=translator.get_partitions_def(stage),
        automation_condition=translator.get_automation_condition(stage),
    )


def _stage_asset(
    stage: Stage,
    state: State,
    project: DvcProject,
    translator: DagsterDvcTranslator,
    runner: StageRunner,
) -> dg.AssetsDefinition:
    name = stage.name

    @dg.multi_asset(
        name=translator.get_op_name(stage),
        specs=[asset_spec(stage, state, translator)],
        pool=translator.get_pool(stage, project),
        retry_policy=translator.get_retry_policy(stage),
        backfill_policy=dg.BackfillPolicy.multi_run(1) if stage.partitioned else None,
    )
    def materialize(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        partition = context.partition_key if context.has_partition_key else None
        yield _materialize(context, project, translator, runner, name, partition)

    return materialize


# -- what materializing it does --------------------------------------------------------------------


def _emitter(context: dg.AssetExecutionContext) -> Emit:
    """Each line goes to stdout (Dagster keeps it as the step's log) and to the event log."""
    count = 0

    def emit(line: str) -> None:
        nonlocal count
        count += 1
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if count <= LOGGED_LINES:
            context.log.info(line)
        elif count == LOGGED_LINES + 1:
            context.log.warning("More than %d lines: the rest is in stdout only.", LOGGED_LINES)

    return emit


def _materialize(
    context: dg.AssetExecutionContext,
    project: DvcProject,
    translator: DagsterDvcTranslator,
    runner: StageRunner,
    stage: str,
    partition: str | None,
) -> dg.MaterializeResult[None]:
    is_code = translator.is_code_of(project)
    before = project.state(is_code)
    node = _node(before, stage, partition)
    stale = before.stale_ancestors(node)
    if stale:
        listed = "; ".join(f"{name} ({', '.join(why)})" for name, why in stale.items())
        context.log.warning(
            f"{node.name} runs on what its upstream left last time, and that is stale: {listed}. "
            f"To bring all of it up to date, materialize `+{stage}`."
        )
    env = {RUN_ID: context.run_id, STAGE: node.name, PARTITION: partition or ""}
    try:
        result = runner.run(StageRequest(project, node, _emitter(context), env))
    except DagsterDvcError as error:
        raise _failure(error, node, runner) from error
    after = project.state(is_code)
    _observe_sources(context, after, node, translator)
    return dg.MaterializeResult(
        asset_key=translator.get_asset_key(after.manifest.stages[stage]),
        data_version=dg.DataVersion(after.data_version(node) or MISSING),
        metadata=_metadata(project, after, node, result, runner, stale),
        tags=event_tags(after, node, translator, instance_positions(context.instance)),
    )


def _node(state: State, stage: str, partition: str | None) -> ResolvedStage:
    try:
        return state.manifest.node(stage, partition)
    except KeyError as error:
        raise dg.Failure(
            f"dvc.yaml has changed since these definitions were loaded: {error.args[0]}. "
            "Next: reload the code location."
        ) from error


def _failure(error: DagsterDvcError, node: ResolvedStage, runner: StageRunner) -> dg.Failure:
    metadata: dict[str, Any] = {
        "dvc/cmd": dg.MetadataValue.text(command_text(node.cmd)),
        "dvc/stage": node.name,
        "dvc/runner": runner.name,
    }
    if isinstance(error, StageFailed):
        tail = "\n".join(error.tail)
        metadata["dvc/log_tail"] = dg.MetadataValue.md(f"```\n{tail}\n```")
        if error.exit_code is not None:
            metadata["dvc/exit_status"] = error.exit_code
        if error.kept:
            metadata["dvc/failed_output"] = dg.MetadataValue.path(error.kept)
    return dg.Failure(description=str(error), metadata=metadata)


def _metadata(
    project: DvcProject,
    state: State,
    node: ResolvedStage,
    result: StageResult,
    runner: StageRunner,
    stale: Mapping[str, list[str]],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dvc/how": result.how,
        "dvc/runner": runner.name,
        "dvc/duration_s": round(result.seconds, 3),
        "dvc/waited_s": round(result.waited, 3),
    }
    if stale:
        found["dvc/stale_upstream"] = sorted(stale)
    found |= {f"dvc/{name}": value for name, value in result.details.items()}
    return found | result_metadata(project, state, node)


# -- sources ---------------------------------------------------------------------------------------


def _observe_sources(
    context: dg.AssetExecutionContext,
    state: State,
    node: ResolvedStage,
    translator: DagsterDvcTranslator,
) -> None:
    """Record the versions of the sources that the stage reads, where Dagster knows another.

    Without it a freshly made asset would look stale until somebody presses "Observe".
    """
    for key, group in by_asset(state.upstreams(node), state, translator).items():
        path = group[0].source
        if path is None:
            continue
        version = state.source_version(path) or MISSING
        seen = context.instance.get_latest_data_version_record(key, is_source=True)
        tags = source_tags(version)
        known = (seen.event_log_entry.tags or {}) if seen else {}
        if any(known.get(name) != value for name, value in tags.items()):
            context.log_event(
                dg.AssetObservation(asset_key=key, tags=tags, metadata={"dvc/path": path})
            )


def _observable_sources(
    state: State, project: DvcProject, translator: DagsterDvcTranslator
) -> dg.AssetsDefinition:
    paths = {translator.get_source_key(path): path for path in state.sources}
    specs = [
        dg.AssetSpec(
            key=key,
            description=translator.get_source_description(path),
            group_name=translator.get_source_group_name(path),
            owners=translator.get_source_owners(path),
            kinds=translator.get_source_kinds(path),
            tags=translator.get_source_tags(path),
            metadata=translator.get_source_metadata(path),
        )
        for key, path in paths.items()
    ]

    def observe(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
        now = project.state(translator.is_code_of(project))
        for key in sorted(context.selected_asset_keys):
            path = paths[key]
            version = now.source_version(path) if path in now.sources else now.md5(path)
            if version is None:
                context.log.warning(f"{path} does not exist in {project.root}")
            yield dg.ObserveResult(
                asset_key=key,
                data_version=dg.DataVersion(version or MISSING),
                metadata={"dvc/path": path, "dvc/md5": version or MISSING},
            )

    with warnings.catch_warnings():  # beta in Dagster 1.13: the only way to observe a subset
        warnings.simplefilter("ignore", dg.BetaWarning)
        decorate = dg.multi_observable_source_asset(
            name=f"observe_{project.name}_sources", specs=specs, can_subset=True
        )
        observable: dg.AssetsDefinition = decorate(observe)
        return observable
