"""The one code location. workspace.yaml points here.

Imports dagster, yaml and the standard library only (tests/pipelines/test_definitions.py): loading
the whole stack here would cost ten times as much, in every process.
"""

from __future__ import annotations

import dagster as dg

from assets.checks import CHECKS
from assets.live import LIVE
from assets.monitoring import MONITORING
from assets.rollout import ROLLOUT
from assets.stages import stage_assets
from contracts import offline
from pipelines.jobs import JOBS
from pipelines.schedules import SCHEDULES
from pipelines.sensors import SENSORS

offline.apply()

defs = dg.Definitions(
    assets=[*stage_assets(), *LIVE, *ROLLOUT, *MONITORING],
    asset_checks=CHECKS,
    jobs=JOBS,
    schedules=SCHEDULES,
    sensors=SENSORS,
    # Stages are processes already; a step process each would add 4.7 CPU seconds.
    executor=dg.in_process_executor,
)
