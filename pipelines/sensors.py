"""Sensors: thin wrappers on pure decisions, which the tests reach without Dagster."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.rollout import last_end
from assets.stages import TRANSLATOR, project
from contracts.digests import file_md5
from contracts.settings import Settings
from dagster_dvc import dvc_sync_sensor
from pipelines.jobs import deploy, lifecycle, try_release

if TYPE_CHECKING:
    from resources.approvals import Request

#: Dagster gives an evaluation 60 s. A look takes two, but for the one that starts an engine.
TICK_SECONDS = 40.0


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


def tick(root: Path, log: Path, patience: float = TICK_SECONDS) -> dict[str, Any] | None:
    """One look of the controller, in a process of its own. None when it is not done in time: it
    starts an engine, goes on, and whoever looks meanwhile is told that it is at work."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.rollout", "tick"],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            start_new_session=True,
        )
    try:
        out, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return None
    if process.returncode:
        raise RuntimeError(f"a tick of the rollout failed with {process.returncode}; read {log}")
    found: dict[str, Any] = json.loads(out)
    return found


def open_rollout(settings: Settings) -> bool:
    """Whether the ledger's last change of `stable` is a rollout's."""
    from resources.ledger import Ledger

    last = Ledger.open(settings).last("stable")
    return last is not None and last.kind == "rollout"


@dg.sensor(
    job=try_release,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Takes an open rollout one step forward or back, and has its end noted. `ratchet "
    "up` looks four times a second; this is for a house without it.",
)
def rollout_tick(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    settings = Settings.from_env()
    said = "no rollout is under way"
    if open_rollout(settings):
        report = tick(settings.root, settings.state_dir / "logs" / "rollout-tick.log")
        said = report["why"] if report else "an engine is starting"
    ended = last_end(settings)
    if ended is None or str(ended["ledger"]) == context.cursor:
        return dg.SkipReason(said)
    config = {"ops": {"rollout": {"config": {"begin": False}}}}
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=f"rollout-{ended['ledger']}", run_config=config)],
        cursor=str(ended["ledger"]),
    )


@dg.sensor(
    jobs=[deploy, try_release],
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Deploys, or tries, a release that waited for a person and was approved.",
)
def approved() -> dg.SensorResult | dg.SkipReason:
    from resources import approvals
    from resources.ledger import Ledger

    ledger = Ledger.open(Settings.from_env())
    found = [
        item
        for item in approvals.requests(ledger)
        if item.state == "approved" and item.entry.channel == "stable"
    ]
    if not found:
        return dg.SkipReason("No approval waits to be used.")
    return dg.SensorResult(run_requests=[_run_of(item) for item in found])


def _run_of(request: "Request") -> dg.RunRequest:
    """The run that uses an approval. Its key is the answer's row: an answer is used once."""
    assert request.answer is not None
    job, asset = (try_release, "rollout") if request.via == "rollout" else (deploy, "deployment")
    config = {"ops": {asset: {"config": {"release": request.entry.release}}}}
    return dg.RunRequest(
        run_key=f"approved-{request.answer.seq}",
        run_config=config,
        job_name=job.name,
        tags={"ratchet/approved_by": request.answer.actor},
    )


SENSORS = [
    approved,
    dvc_sync_sensor(project(), TRANSLATOR, name="dvc_sync", minimum_interval_seconds=30),
    retrain,
    rollout_tick,
]
