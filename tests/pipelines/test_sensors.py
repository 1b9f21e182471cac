from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from contracts.settings import Settings
from pipelines import sensors


def write(monitoring: Path, day: str, verdict: str, **more: object) -> None:
    (monitoring / day).mkdir(parents=True)
    (monitoring / day / "drift.json").write_text(
        json.dumps({"verdict": verdict, "day": day, **more})
    )


@pytest.mark.parametrize("verdict", ["stable", "shift", "no_verdict", ""])
def test_only_drift_that_proved_harm_asks(verdict: str) -> None:
    assert sensors.decide([("2026-01-01", "digest", {"verdict": verdict})]) == []


def test_one_request_per_verdict(settings: Settings) -> None:
    write(settings.monitoring_dir, "2026-01-02", "drift", reason="new topics, refusals doubled")
    write(settings.monitoring_dir, "2026-01-01", "stable")
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance)
        first, again = sensors.retrain(context), sensors.retrain(context)
    assert isinstance(first, dg.SensorResult) and isinstance(again, dg.SensorResult)
    assert first.run_requests and again.run_requests
    (request,) = first.run_requests
    assert request.tags["ratchet/drift_day"] == "2026-01-02"
    assert request.tags["ratchet/reason"] == "new topics, refusals doubled"
    # The same verdict keeps its run key, which Dagster runs once, also after a restart.
    assert request.run_key == again.run_requests[0].run_key


def test_no_verdicts_is_a_reason_to_skip(settings: Settings) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert isinstance(sensors.retrain(dg.build_sensor_context(instance)), dg.SkipReason)
