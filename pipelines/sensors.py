"""Sensors: thin wrappers on pure decisions, which the tests reach without Dagster."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from assets.stages import TRANSLATOR, project
from contracts.digests import file_md5
from contracts.settings import Settings
from dagster_dvc import dvc_sync_sensor
from pipelines.jobs import lifecycle


@dataclass(frozen=True)
class Retrain:
    """A request to retrain. ``key`` is the verdict's digest, so one verdict asks once."""

    key: str
    day: str
    reason: str


def decide(verdicts: list[tuple[str, str, dict[str, Any]]]) -> list[Retrain]:
    """Which verdicts ask for a retrain run.

    Args:
        verdicts: (day, digest of the verdict file, the verdict), in any order.
    """
    return [
        Retrain(key=f"drift-{digest}", day=day, reason=str(verdict.get("reason", "drift")))
        for day, digest, verdict in sorted(verdicts, key=lambda row: row[0])
        if verdict.get("verdict") == "drift"
    ]


def read_verdicts(monitoring: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Every drift verdict on disk."""
    return [
        (path.parent.name, file_md5(path), json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(monitoring.glob("*/drift.json"))
    ]


@dg.sensor(
    job=lifecycle,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests one lifecycle run per drift verdict that proved harm.",
)
def retrain() -> dg.SensorResult | dg.SkipReason:
    wanted = decide(read_verdicts(Settings.from_env().monitoring_dir))
    if not wanted:
        return dg.SkipReason("No drift verdict asks for a retrain run.")
    # Dagster drops a run key that it has seen, also after a restart: once per verdict.
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=item.key,
                tags={"ratchet/drift_day": item.day, "ratchet/reason": item.reason},
            )
            for item in wanted
        ]
    )


SENSORS = [
    dvc_sync_sensor(project(), TRANSLATOR, name="dvc_sync", minimum_interval_seconds=30),
    retrain,
]
