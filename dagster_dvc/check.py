"""What cannot be shown as assets, all of it at once.

In: a project's state and a translator. Out: a list of ``Offence``. Everything that Dagster would
refuse later one by one, or that would make an asset lie about its stage, is named here together
with its place in ``dvc.yaml`` and what to change.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from .errors import Offence
from .manifest import Stage
from .state import State
from .translator import META_KEYS, DagsterDvcTranslator

_NAME = re.compile(r"^[A-Za-z0-9_]+$")
_RESERVED = frozenset(
    {
        "context",
        "conf",
        "config",
        "meta",
        "arg_dict",
        "dict",
        "input_arg_dict",
        "output_arg_dict",
        "int",
        "str",
        "float",
        "bool",
        "input",
        "output",
        "type",
        *keyword.kwlist,
    }
)
_ILLEGAL_IN_KEYS = ("...", "\a", "\b", "\f", "\n", "\r", "\t", "\v", "\0", ",")


def _where(stage: Stage) -> str:
    return f"dvc.yaml:{stage.line}" if stage.line else "dvc.yaml"


def _artifacts(stage: Stage) -> Iterator[Offence]:
    for node in stage.resolved.values():
        paths = [out.path for out in node.outs if out.artifact]
        if len(paths) > 1:
            yield Offence(
                _where(stage),
                f"stage {node.name!r} has {len(paths)} cached outputs: {', '.join(paths)}",
                "an asset is one artifact: write them into one folder and make that the output, "
                "split the stage, or mark what is only reported as `metrics` or `plots`.",
            )
            return  # the other keys of a foreach have the same outputs


def _names(stage: Stage, translator: DagsterDvcTranslator) -> Iterator[Offence]:
    override = "or override DagsterDvcTranslator.get_asset_key"
    for part in translator.get_asset_key(stage).path:
        if not _NAME.match(part):
            better = re.sub(r"[^A-Za-z0-9_]+", "_", part).strip("_") or "a_name"
            yield Offence(
                _where(stage),
                f"stage {stage.name!r}: {part!r} is no name that Dagster can use",
                f"only letters, digits and _ are: rename the stage to {better!r}, {override}.",
            )
    name = translator.get_op_name(stage)
    if name in _RESERVED:
        yield Offence(
            _where(stage),
            f"stage {stage.name!r}: {name!r} is a word that Dagster or Python reserves",
            f"rename the stage, {override} and get_op_name.",
        )


def _partitions(stage: Stage) -> Iterator[Offence]:
    for key in stage.keys:
        bad = [text for text in _ILLEGAL_IN_KEYS if text in key]
        if bad or not key:
            yield Offence(
                _where(stage),
                f"stage {stage.name!r}: its key {key!r} is no partition key that Dagster can use",
                f"it must not be empty nor contain {', '.join(map(repr, bad)) or 'nothing'}: "
                "rename the key of the foreach/matrix.",
            )
    described = {repr((node.desc, node.meta)) for node in stage.resolved.values()}
    if len(described) > 1:
        yield Offence(
            _where(stage),
            f"stage {stage.name!r}: desc or meta differ between its keys",
            "they describe one asset: leave ${item} and ${key} out of desc and meta.",
        )


def _meta(stage: Stage) -> Iterator[Offence]:
    for key in stage.dagster_meta:
        if key not in META_KEYS:
            near = difflib.get_close_matches(str(key), META_KEYS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield Offence(
                _where(stage),
                f"stage {stage.name!r}: meta.dagster has {key!r}, which means nothing here",
                f"{hint}It may hold {', '.join(META_KEYS)}.",
            )


def _chains(stage: Stage, state: State) -> Iterator[Offence]:
    for node in stage.resolved.values():
        for upstream in state.upstreams(node):
            if upstream.asset == stage.name:
                yield Offence(
                    _where(stage),
                    f"stage {node.name!r} reads {upstream}, another key of the same stage",
                    "keys become partitions of one asset, which cannot depend on itself here: "
                    "make the last step a stage of its own.",
                )


def _duplicates(
    state: State, translator: DagsterDvcTranslator
) -> Iterator[tuple[dg.AssetKey, Offence]]:
    seen: dict[dg.AssetKey, str] = {}
    named = [
        (translator.get_asset_key(s), f"stage {s.name!r}", _where(s))
        for s in state.manifest.stages.values()
    ]
    named += [
        (translator.get_source_key(path), f"source {path!r}", "dvc.yaml") for path in state.sources
    ]
    for key, what, where in named:
        if key in seen:
            yield (
                key,
                Offence(
                    where,
                    f"{what} and {seen[key]} are both the asset {key.to_user_string()!r}",
                    "rename one, or override get_asset_key or get_source_key of the translator.",
                ),
            )
        seen.setdefault(key, what)


def _accepted(stage: Stage, make: Callable[[Stage], object]) -> Iterator[Offence]:
    """Dagster's own opinion: owners, tags, groups, kinds and pools have rules of their own."""
    try:
        make(stage)
    except (dg.DagsterError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield Offence(
            _where(stage),
            f"stage {stage.name!r}: Dagster refuses it: {str(error).strip()}",
            "correct meta.dagster of the stage (owners are e-mail addresses or team:name; groups "
            "and pools are letters, digits and _; runner is one that dvc_assets was given).",
        )


def offences(
    state: State, translator: DagsterDvcTranslator, make: Callable[[Stage], object]
) -> list[Offence]:
    """All that is wrong, in file order.

    Args:
        state: the project now.
        translator: names the assets.
        make: builds the asset of one stage; what it raises is an offence, unless something else
            is wrong with that stage already.
    """
    doubles = list(_duplicates(state, translator))
    double_keys = {key for key, _ in doubles}
    found: list[Offence] = []
    for stage in state.manifest.stages.values():
        own = [
            *_artifacts(stage),
            *_names(stage, translator),
            *_partitions(stage),
            *_meta(stage),
            *_chains(stage, state),
        ]
        if not own and translator.get_asset_key(stage) not in double_keys:
            own = list(_accepted(stage, make))
        found += own
    return found + [offence for _, offence in doubles]


_IGNORED_BY_THE_RUN_CACHE = ("size", "nfiles")


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def warnings(state: State) -> list[str]:
    """What Dagster accepts and DVC gets wrong (treeverse/dvc#10296)."""
    found = []
    for stage in state.manifest.stages.values():
        names = {
            key
            for one in stage.resolved.values()
            for params in one.params
            for key in _keys(params.values)
        }
        bad = sorted(names.intersection(_IGNORED_BY_THE_RUN_CACHE))
        if bad:
            found.append(
                f"{_where(stage)}: stage {stage.name!r} has parameters named {', '.join(bad)}: "
                "DVC's run cache ignores these names and restores stale output. Rename them."
            )
    return found
