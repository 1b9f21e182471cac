from __future__ import annotations

from datetime import UTC, datetime

import dagster as dg

from pipelines.schedules import nightly_schedule


def test_the_night_evaluates_the_day_that_ended() -> None:
    context = dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 3, 1, 2, tzinfo=UTC)
    )
    request = nightly_schedule(context)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == request.run_key == "2026-02-28"
