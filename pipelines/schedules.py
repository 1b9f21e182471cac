"""Schedules. Yesterday is evaluated at 02:00 UTC, when its last requests have been written."""

from datetime import timedelta

import dagster as dg

from pipelines.jobs import nightly


@dg.schedule(
    job=nightly,
    cron_schedule="0 2 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Evaluates the day that has just ended.",
)
def nightly_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    day = (context.scheduled_execution_time - timedelta(days=1)).strftime("%Y-%m-%d")
    return dg.RunRequest(run_key=day, partition_key=day)


SCHEDULES = [nightly_schedule]
