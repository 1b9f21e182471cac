"""Run one job in this process, against this checkout's Dagster instance: the UI shows it after."""

from __future__ import annotations

from contracts.errors import ConfigError, ServiceError
from contracts.settings import Settings
from pipelines.instance import prepare_home

#: The stages' own lines are the progress; Dagster's event log keeps the rest.
QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}


def run_job(name: str, partition: str | None, settings: Settings) -> str:
    """Execute the job ``name`` and return the run id.

    Raises:
        ConfigError: no such job, or its partition is missing or unknown.
        ServiceError: steps failed; each is named with its reason.
    """
    import dagster as dg

    from pipelines.definitions import defs
    from pipelines.jobs import JOBS

    if name not in {job.name for job in JOBS}:
        raise ConfigError(
            f"There is no job {name!r}.", next=f"one of: {', '.join(job.name for job in JOBS)}"
        )
    prepare_home(settings)
    job = defs.resolve_job_def(name)
    _check_partition(job, partition)
    with dg.DagsterInstance.get() as instance:
        result = job.execute_in_process(
            instance=instance, partition_key=partition, raise_on_error=False, run_config=QUIET
        )
    if not result.success:
        raise ServiceError(
            f"The job {name!r} failed.",
            where=f"Dagster run {result.run_id}",
            offenders=_failures(result) or ["no step ran; the run's events in the UI say why"],
            next="mend it and run it again: finished work is skipped",
        )
    return str(result.run_id)


def _check_partition(job: object, partition: str | None) -> None:
    definition = getattr(job, "partitions_def", None)
    if definition is None:
        if partition is not None:
            raise ConfigError("This job has no partitions.", next="leave --partition out")
        return
    keys = definition.get_partition_keys()
    if partition not in keys:
        shown = ", ".join(keys if len(keys) <= 8 else [keys[0], "…", keys[-1]])
        raise ConfigError(
            f"{partition!r} is not a partition of this job."
            if partition
            else "This job needs a partition.",
            next=f"--partition with one of: {shown}",
        )


def _failures(result: object) -> list[str]:
    """Every failed step with the reason that its author gave, else the exception's."""
    found = []
    for event in result.all_events:  # type: ignore[attr-defined]
        if event.is_step_failure:
            data = event.step_failure_data
            told = data.user_failure_data.description if data.user_failure_data else None
            found.append(f"{event.step_key}: {told or (data.error and data.error.message)}")
    return found
