"""What a ``dvc.yaml`` means in Dagster, decided in one class with a method per attribute.

In: a ``Stage`` (or the path of a source). Out: the values of an ``AssetSpec``. To change one
decision, override one method. By default everything that people may want to say stands in
``dvc.yaml`` itself, where DVC ignores it (``desc`` and ``meta`` are not locked and invalidate
nothing)::

    stages:
      chunks:
        desc: Structure-aware, token-exact chunks.
        meta:
          dagster: {group: knowledge, owners: ["team:search"], kinds: [python],
                    tags: {tier: gold}, pool: gpu}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from .manifest import Stage
from .project import DvcProject
from .runner import command_text
from .state import State

META_KEYS = ("group", "owners", "kinds", "tags", "pool", "runner", "metadata")


class DagsterDvcTranslator:
    """Translates stages and sources into the attributes of assets. Override what you disagree with.

    Methods that start with ``get_source_`` are about sources: files that a stage reads and no
    stage makes.
    """

    # -- stages --------------------------------------------------------------------------------

    def get_asset_key(self, stage: Stage) -> dg.AssetKey:
        """The asset's key: the stage's name."""
        return dg.AssetKey(stage.name)

    def get_op_name(self, stage: Stage) -> str:
        """The name of the step in a run: the key's parts, joined as Dagster joins them."""
        return "__".join(self.get_asset_key(stage).path)

    def get_description(self, stage: Stage) -> str | None:
        """Shown in the UI: ``desc``."""
        return stage.desc

    def get_group_name(self, stage: Stage) -> str | None:
        """The asset group: ``meta.dagster.group``."""
        group = stage.dagster_meta.get("group")
        return None if group is None else str(group)

    def get_owners(self, stage: Stage) -> Sequence[str]:
        """E-mail addresses or ``team:…``: ``meta.dagster.owners``."""
        return _listed(stage.dagster_meta.get("owners"))

    def get_kinds(self, stage: Stage) -> set[str]:
        """The badges on the asset: ``dvc`` and ``meta.dagster.kinds``."""
        return {"dvc", *_listed(stage.dagster_meta.get("kinds"))}

    def get_tags(self, stage: Stage) -> Mapping[str, str]:
        """Tags to search by: ``meta.dagster.tags``."""
        tags = stage.dagster_meta.get("tags") or {}
        return {str(key): str(value) for key, value in dict(tags).items()}

    def get_metadata(self, stage: Stage) -> Mapping[str, Any]:
        """Static metadata: command, outputs, parameters, where it is written, and
        ``meta.dagster.metadata``."""
        said = stage.dagster_meta.get("metadata") or {}
        where = f"dvc.yaml:{stage.line}" if stage.line else "dvc.yaml"
        params = [key for params in stage.params for key in (params.keys or (params.path,))]
        return {
            "dvc/stage": stage.name,
            "dvc/defined_in": where,
            "dvc/cmd": dg.MetadataValue.text(command_text(stage.cmd)),
            "dvc/outs": [out.path for out in stage.outs],
            **({"dvc/params": params} if params else {}),
            **dict(said),
        }

    def get_code_version(self, stage: Stage, state: State) -> str | None:
        """Hash of command, used parameters, code dependencies and output paths.

        Change ``is_code`` rather than this: the sync sensor compares with the same hash.
        """
        return state.code_version(stage)

    def get_partitions_def(self, stage: Stage) -> dg.PartitionsDefinition[str] | None:
        """``foreach``/``matrix`` keys as static partitions; None for a plain stage."""
        return dg.StaticPartitionsDefinition(list(stage.keys)) if stage.partitioned else None

    def get_pool(self, stage: Stage, project: DvcProject) -> str | None:
        """The concurrency pool: ``meta.dagster.pool``, else the project's name: one per checkout.

        One per checkout, because one stage at a time may use it; without a limit on the pool in
        Dagster, steps wait inside their process instead of in the queue.
        """
        pool = stage.dagster_meta.get("pool")
        return project.name if pool is None else str(pool)

    def get_automation_condition(self, stage: Stage) -> dg.AutomationCondition[Any] | None:
        """None: nothing runs by itself."""
        return None

    def get_retry_policy(self, stage: Stage) -> dg.RetryPolicy | None:
        """None: a stage that failed on these inputs will fail on them again."""
        return None

    def get_runner_name(self, stage: Stage) -> str | None:
        """Which of the named runners of ``dvc_assets`` runs it: ``meta.dagster.runner``."""
        runner = stage.dagster_meta.get("runner")
        return None if runner is None else str(runner)

    # -- code and sources ----------------------------------------------------------------------

    def is_code(self, path: str, project: DvcProject) -> bool:
        """Whether a dependency that no stage makes is code: it then counts in the code version.

        Everything else that no stage makes is a source. By default: known suffixes, and folders
        that are Python packages.
        """
        return project.is_code(path)

    def is_code_of(self, project: DvcProject) -> _IsCode:
        """``is_code`` for one project, as the rest of the package wants it."""
        return _IsCode(self, project)

    def get_source_key(self, path: str) -> dg.AssetKey:
        """The key of a source: its path, split at the slashes."""
        return dg.AssetKey([part for part in path.replace("://", "/").split("/") if part])

    def get_source_description(self, path: str) -> str | None:
        """Shown in the UI."""
        return f"`{path}`: read by DVC stages, made by none of them."

    def get_source_group_name(self, path: str) -> str | None:
        """The asset group of sources."""
        return "sources"

    def get_source_owners(self, path: str) -> Sequence[str]:
        """None known."""
        return ()

    def get_source_kinds(self, path: str) -> set[str]:
        """The badge on a source."""
        return {"file"}

    def get_source_tags(self, path: str) -> Mapping[str, str]:
        """None."""
        return {}

    def get_source_metadata(self, path: str) -> Mapping[str, Any]:
        """Static metadata of a source."""
        return {"dvc/path": path}


class _IsCode:
    """A translator's ``is_code`` bound to a project (picklable, unlike a lambda)."""

    def __init__(self, translator: DagsterDvcTranslator, project: DvcProject) -> None:
        self._translator = translator
        self._project = project

    def __call__(self, path: str) -> bool:
        return self._translator.is_code(path, self._project)


def _listed(value: Any) -> list[str]:
    """A list from a list, a single word, or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]
