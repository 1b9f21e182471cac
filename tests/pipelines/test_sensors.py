from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from contracts.errors import ApprovalError
from contracts.settings import ROOT, Settings
from pipelines import sensors
from resources import approvals, releases
from resources.approvals.requested import Via
from resources.ledger import Ledger
from tests.serving.factory import build


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


def test_an_approval_runs_the_job_that_asked_for_it_once(settings: Settings) -> None:
    """The first through a deployment, the second through a rollout."""
    for name in ("approval", "rollout"):
        path = settings.root / f"data/policies/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            (ROOT / f"data/policies/{name}.yaml").read_text().replace("from: high", "from: low")
        )
    ledger = Ledger.open(settings)
    via: tuple[Via, ...] = ("deploy", "rollout")
    for mark in via:
        file = releases.install(build(settings.root, mark), settings.root, settings)
        release = releases.load(settings, file.name).release
        with pytest.raises(ApprovalError):
            approvals.require(settings, ledger, release, "stable", mark)
    assert isinstance(sensors.approved(dg.build_sensor_context()), dg.SkipReason)
    for request in approvals.requests(ledger):
        token = approvals.token_of(settings, request)
        approvals.answer(
            settings, ledger, request.seq, token=token, approve=True, name="Ann Lee", reason=""
        )
    found = sensors.approved(dg.build_sensor_context())
    assert isinstance(found, dg.SensorResult) and found.run_requests
    one, two = found.run_requests
    assert (one.job_name, two.job_name) == ("deploy", "try_release")
    assert one.run_key != two.run_key and one.tags["ratchet/approved_by"] == "Ann Lee"
    first = approvals.requests(ledger)[0]
    assert one.run_config == {"ops": {"deployment": {"config": {"release": first.entry.release}}}}
