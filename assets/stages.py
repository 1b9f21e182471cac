"""The stage assets: generated from dvc.yaml, one asset a stage.

Only what is this project's own stands here: where to find the graph and how our stages look in the
UI. Everything else is dagster_dvc.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg

from assets import reports
from contracts.settings import Settings
from dagster_dvc import (
    DagsterDvcTranslator,
    DvcProject,
    LocalRunner,
    Stage,
    StageRequest,
    StageResult,
    dvc_assets,
)
from resources.spool import start_tracking


class Translator(DagsterDvcTranslator):
    """How Ratchet's stages appear in Dagster."""

    def get_description(self, stage: Stage) -> str | None:
        """``desc``, and below it the link to the report of a stage that writes one."""
        said = super().get_description(stage)
        return reports.with_report(said, stage.name) if stage.name in reports.STAGES else said

    def get_source_key(self, path: str) -> dg.AssetKey:
        """Under ``source``: the folder ``prompts`` and the stage ``prompts`` are two things."""
        return dg.AssetKey(["source", *path.split("/")])


TRANSLATOR = Translator()


@cache
def project(root: Path | None = None) -> DvcProject:
    """The DVC project of this checkout."""
    return DvcProject(root or Settings.from_env().root)


class TrackedRunner(LocalRunner):
    """Runs stages here and has MLflow told of them.

    The stage itself cannot start the tracker: whatever it leaves running ends with it.
    """

    def run(self, request: StageRequest) -> StageResult:
        try:
            return super().run(request)
        finally:
            start_tracking(Settings.from_env())


def stage_assets() -> list[Any]:
    """One asset per stage and one observable source per file that no stage makes."""
    return dvc_assets(project(), translator=TRANSLATOR, runner=TrackedRunner())
