"""MLflow: a run per pipeline execution, a nested run per executed stage.

In: the spool of stage executions and dvc.lock. Out: runs in the experiment ``ratchet`` with
parameters, metrics, inputs and outputs by DVC digest, git commit, lock digest, device and the
Dagster run id where there is one. The bytes live in DVC; MLflow holds references which resolve to
a path and a digest (:class:`DvcSource`).

As a process (``python -m resources.tracking``): logs what the spool holds, waits for executions
whose ``dvc`` still runs, exits when the spool stayed empty for a few seconds. One a checkout; a
second one exits at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from contracts import offline
from contracts.digests import path_md5
from contracts.errors import ServiceError
from contracts.records import StageExecution
from contracts.settings import Settings
from resources import processes, spool

EXPERIMENT = "ratchet"
LINGER = 8.0  # seconds: importing MLflow again for the next stage costs 5 CPU seconds
POLL = 0.5
TAG = "ratchet."  # prefix of our tags
METRICS = "data/metrics/"  # a stage's metrics file is no artifact that a release could name


class Tracking:
    """A thin client over MlflowClient: our experiment, our tags, DVC digests as datasets."""

    def __init__(self, settings: Settings) -> None:
        offline.apply()
        import mlflow
        from mlflow.tracking import MlflowClient

        self.settings = settings
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        try:
            # MLflow migrates a new store on first use and two processes that do it at once break
            # it ("duplicate column name: step").
            with (settings.state_dir / "mlflow.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.client = MlflowClient(tracking_uri=settings.mlflow_uri)
                found = self.client.get_experiment_by_name(EXPERIMENT)
                self.experiment: str = (
                    found.experiment_id
                    if found
                    else self.client.create_experiment(
                        EXPERIMENT, artifact_location=(settings.state_dir / "mlartifacts").as_uri()
                    )
                )
        except mlflow.exceptions.MlflowException as error:
            raise ServiceError(
                f"MLflow's tracking store does not answer: {error}",
                where=settings.mlflow_uri,
                next="start it, or unset MLFLOW_TRACKING_URI to use the local SQLite store",
            ) from None

    def log(self, execution: StageExecution, record: str) -> str:
        """Log one execution as a nested run and return the run id. Twice the same: logged once."""
        parent = self._parent(execution)
        if known := self.find(f"tags.`{TAG}record` = '{record}'"):
            return str(known[0].info.run_id)
        start = int(datetime.fromisoformat(execution.started).timestamp() * 1000)
        name = execution.stage + (f"@{execution.partition}" if execution.partition else "")
        run = self.client.create_run(
            self.experiment,
            start_time=start,
            run_name=name,
            tags=self._tags(execution) | {"mlflow.parentRunId": parent},
        )
        run_id: str = run.info.run_id
        self._log_content(run_id, execution, start)
        # The tag that says "logged" comes last: after a crash before it, the run is logged anew
        # and the half one stays marked as unfinished.
        self.client.set_tag(run_id, f"{TAG}record", record)
        end = start + int(execution.seconds * 1000)
        self.client.set_terminated(run_id, execution.status, end_time=end)
        self.client.set_terminated(parent, execution.status, end_time=end)
        return run_id

    def find(self, query: str, limit: int = 100) -> list[Any]:
        """Runs of our experiment, newest first."""
        return list(self.client.search_runs([self.experiment], query, max_results=limit))

    def stage_runs(self, digest: str) -> list[Any]:
        """Runs that made the DVC object ``digest``, newest first."""
        return self.find(f"tags.`{TAG}out_md5` = '{digest}'")

    def _parent(self, execution: StageExecution) -> str:
        """The run of the pipeline execution, made when its first stage is logged."""
        if known := self.find(
            f"tags.`{TAG}execution` = '{execution.execution}' and tags.`{TAG}kind` = 'pipeline'"
        ):
            return str(known[0].info.run_id)
        tags = {
            f"{TAG}kind": "pipeline",
            f"{TAG}execution": execution.execution,
            f"{TAG}driver": execution.driver,
            "mlflow.source.git.commit": execution.git_commit or "",
        }
        if execution.dagster_run_id:
            tags["dagster/run_id"] = execution.dagster_run_id
        start = int(datetime.fromisoformat(execution.started).timestamp() * 1000)
        run = self.client.create_run(
            self.experiment, start_time=start, run_name=execution.execution, tags=tags
        )
        return str(run.info.run_id)

    def _tags(self, execution: StageExecution) -> dict[str, str]:
        tags = {
            f"{TAG}kind": "stage",
            f"{TAG}stage": execution.stage,
            f"{TAG}execution": execution.execution,
            f"{TAG}driver": execution.driver,
            f"{TAG}device": execution.device,
            "mlflow.source.git.commit": execution.git_commit or "",
            "mlflow.source.name": f"stages.{execution.stage}",
        }
        optional = {
            f"{TAG}partition": execution.partition,
            f"{TAG}error": execution.error and execution.error[:5000],
            "dagster/run_id": execution.dagster_run_id,
        }
        return tags | {key: value for key, value in optional.items() if value}

    def _log_content(self, run_id: str, execution: StageExecution, at: int) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params = [Param(key, value[:6000]) for key, value in _flat(execution.params)]
        numbers = execution.metrics | {
            "seconds": execution.seconds,
            "peak_rss_mb": execution.peak_rss_mb,
        }
        metrics = [Metric(key, float(value), at, 0) for key, value in numbers.items()]
        entry = _lock_entry(self.settings.root, execution)
        tags = [RunTag(f"{TAG}lock_md5", spool.lock_md5(self.settings.root) or "")]
        if execution.status == "FINISHED" and entry:
            for out in entry.get("outs", []):
                if not out["path"].startswith(METRICS):
                    tags += [RunTag(f"{TAG}out_md5", out["md5"]), RunTag(f"{TAG}out", out["path"])]
            self._log_datasets(run_id, entry)
            self._log_report(run_id, entry)
        elif execution.status == "FAILED":
            self._log_refused(run_id, execution.stage)
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])
        self.client.log_batch(run_id, metrics=metrics, tags=tags)

    def _log_report(self, run_id: str, entry: dict[str, Any]) -> None:
        """The stage's page as an artifact of its run, where it writes one: MLflow shows it there.

        Skipped when the folder has moved on since: the page would be that of another execution.
        """
        for out in entry.get("outs", []):
            page = self.settings.root / out["path"] / "report.html"
            if page.is_file() and path_md5(page.parent) == out["md5"]:
                self._log_page(run_id, page)

    def _log_refused(self, run_id: str, stage: str) -> None:
        """The page of what a stage refused, as it kept it in the state folder."""
        page = self.settings.state_dir / "refused" / stage / "report.html"
        if page.is_file():
            self._log_page(run_id, page)

    def _log_page(self, run_id: str, page: Path) -> None:
        self.client.log_artifact(run_id, str(page))
        self.client.set_tag(run_id, f"{TAG}report", page.name)

    def _log_datasets(self, run_id: str, entry: dict[str, Any]) -> None:
        """Inputs and outputs of the stage as MLflow datasets whose digest is DVC's."""
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        inputs = []
        for context, key in (("input", "deps"), ("output", "outs")):
            for item in entry.get(key, []):
                if "md5" not in item:
                    continue
                dataset = MetaDataset(
                    dvc_source(item["path"], item["md5"]), name=item["path"], digest=item["md5"]
                )
                inputs.append(
                    DatasetInput(
                        dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]
                    )
                )
        if inputs:
            self.client.log_inputs(run_id, inputs)


def dvc_source(path: str, md5: str) -> Any:
    """A reference to one DVC object that MLflow can store and load again."""
    return _source_class()(path, md5)


def register_source() -> None:
    """Teach MLflow in this process to read our references back (``mlflow.data.get_source``)."""
    from mlflow.data.dataset_source_registry import _dataset_source_registry

    _dataset_source_registry.register(_source_class())


_SOURCE: list[Any] = []


def _source_class() -> Any:
    """The class, made on first use: its base class costs MLflow's import."""
    if _SOURCE:
        return _SOURCE[0]
    from mlflow.data.dataset_source import DatasetSource

    class DvcSource(DatasetSource):  # type: ignore[misc]
        """``{"path", "md5"}``; :meth:`load` gives the local path of those very bytes."""

        def __init__(self, path: str, md5: str) -> None:
            self.path, self.md5 = path, md5

        @staticmethod
        def _get_source_type() -> str:
            return "dvc"

        @staticmethod
        def _can_resolve(raw_source: Any) -> bool:
            return isinstance(raw_source, str) and raw_source.startswith("dvc://")

        @classmethod
        def _resolve(cls, raw_source: str) -> Any:
            md5, _, path = raw_source.removeprefix("dvc://").partition("/")
            return cls(path, md5)

        def to_dict(self) -> dict[str, str]:
            return {"path": self.path, "md5": self.md5}

        @classmethod
        def from_dict(cls, source_dict: dict[str, str]) -> Any:
            return cls(source_dict["path"], source_dict["md5"])

        def load(self, root: Path | None = None) -> Path:
            """The workspace path when it holds these bytes, else the object in DVC's cache."""
            return resolve_dvc(self.path, self.md5, root or Settings.from_env().root)

    _SOURCE.append(DvcSource)
    return DvcSource


def resolve_file(path: str, md5: str, root: Path, inside: str) -> Path | None:
    """A file of the folder ``md5``, or ``md5`` itself where that is a file; None where it is not
    here. See :func:`resolve_dvc`."""
    from contracts.errors import NotFoundError

    try:
        found = resolve_dvc(path, md5, root)
    except NotFoundError:
        return None
    if found.is_dir():
        found /= inside
    elif md5.endswith(".dir"):
        rows = json.loads(found.read_text(encoding="utf-8"))
        stored = next((row["md5"] for row in rows if row["relpath"] == inside), None)
        if stored is None:
            return None
        found = root / ".dvc" / "cache" / "files" / "md5" / stored[:2] / stored[2:]
    return found if found.is_file() else None


def resolve_dvc(path: str, md5: str, root: Path) -> Path:
    """Where the bytes ``md5`` are: the workspace, or DVC's cache (a folder's manifest for .dir)."""
    from contracts.digests import path_md5
    from contracts.errors import NotFoundError

    workspace = root / path
    if workspace.exists() and path_md5(workspace) == md5:
        return workspace
    cached = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    if cached.exists():
        return cached
    raise NotFoundError(
        f"{path} at {md5} is neither in the workspace nor in DVC's cache.",
        where=str(root),
        next="check out the commit that made it and run `dvc pull`",
    )


def _lock_entry(root: Path, execution: StageExecution) -> dict[str, Any] | None:
    import yaml

    lock = root / "dvc.lock"
    if not lock.is_file():
        return None
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    suffix = f"@{execution.partition}" if execution.partition else ""
    entry: dict[str, Any] | None = stages.get(execution.stage + suffix)
    return entry


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as dotted names."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), json.dumps(value) if isinstance(value, list) else str(value)


def pending(settings: Settings) -> list[Path]:
    """Records in the spool, oldest first."""
    return sorted(settings.spool_dir.glob("*.json"))


def flush(settings: Settings, tracking: Tracking | None = None) -> tuple[int, int]:
    """Log every record whose ``dvc`` has ended. Returns (logged, still waiting)."""
    logged = waiting = 0
    for path in pending(settings):
        execution = read_record(path)
        if execution is None:
            continue
        pid, _, ticks = (execution.process or "0-0").partition("-")
        if processes.alive(int(pid), int(ticks)):
            waiting += 1
            continue
        tracking = tracking or Tracking(settings)
        tracking.log(execution, path.name)
        path.unlink(missing_ok=True)
        logged += 1
    return logged, waiting


def read_record(path: Path) -> StageExecution | None:
    """The record, or None for one that cannot be read; that one is set aside, not lost."""
    try:
        return StageExecution.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"tracking: {path.name} cannot be read and is set aside: {error}", file=sys.stderr)
        os.replace(path, path.with_suffix(".bad"))
        return None


@contextmanager
def only_one(settings: Settings) -> Iterator[bool]:
    """Yields whether this process is the checkout's one tracker."""
    settings.spool_dir.mkdir(parents=True, exist_ok=True)
    with (settings.spool_dir / "tracking.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def drain(settings: Settings, linger: float) -> int:
    """Empty the spool, waiting for running stages; return the number of logged records."""
    total = 0
    tracking: Tracking | None = None
    # After letting go of the lock we look once more: a record spooled just before found us still
    # holding it, and its own tracker left at once.
    while pending(settings):
        with only_one(settings) as mine:
            if not mine:
                return total
            quiet_since = time.monotonic()
            while time.monotonic() - quiet_since < linger or pending(settings):
                if pending(settings):
                    tracking = tracking or Tracking(settings)
                    logged, _ = flush(settings, tracking)
                    total += logged
                    quiet_since = time.monotonic()
                time.sleep(POLL)
    return total


if __name__ == "__main__":
    print(f"tracking: {drain(Settings.from_env(), LINGER)} stage executions logged", flush=True)
