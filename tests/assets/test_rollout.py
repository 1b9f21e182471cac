"""The asset and the sensor of a rollout, over the real commands as processes."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from assets import rollout as module
from assets.live import read_release
from contracts.settings import ROOT, Settings
from pipelines import sensors
from resources.ledger import Ledger
from tests.serving.rollouts import FileEngines, controller, deployed, install, quick, releasable


@pytest.fixture
def candidate(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """A release on `stable`, and another one in data/release.json; its id."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the commands' code comes from this repository
    deployed(settings, install(settings, "one"))
    releasable(settings.root, "two")
    return read_release(settings).id


def materialize(**config: Any) -> dg.ExecuteInProcessResult:
    """Run the asset alone."""
    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize(
            [module.rollout],
            instance=instance,
            run_config={"ops": {"rollout": {"config": config}}},
            raise_on_error=False,
        )


def test_a_run_begins_a_rollout_and_does_not_wait(settings: Settings, candidate: str) -> None:
    rules = settings.root / "data/policies/rollout.yaml"
    rules.write_text("strategy: ab\n")
    result = materialize(reason="try it")
    assert result.success
    (event,) = result.asset_materializations_for_node("rollout")
    assert event.metadata["release"].value == candidate
    row = Ledger.open(settings).last("stable")
    assert row is not None and (row.kind, row.release, row.reason) == (
        "rollout", candidate, "try it",
    )  # fmt: skip
    assert row.actor.startswith("dagster:") and row.body["rollout"]["strategy"] == "ab"


def test_the_sensor_looks_and_has_the_end_noted(settings: Settings, candidate: str) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance)
        assert isinstance(sensors.rollout_tick(context), dg.SkipReason)
        engines = FileEngines(settings)
        found = controller(settings, engines)
        second = install(settings, "three")
        found.begin(second, quick(), "canary")
        found.tick()  # its engine is no process: the next look, by a process, finds it gone
        result = sensors.rollout_tick(context)
        assert isinstance(result, dg.SensorResult) and result.run_requests
        (request,) = result.run_requests
        last = Ledger.open(settings).last("stable")
        assert last is not None and last.kind == "rolled_back"
        assert request.run_key == f"rollout-{last.seq}" and result.cursor == str(last.seq)
        again = sensors.rollout_tick(dg.build_sensor_context(instance, cursor=result.cursor))
        assert isinstance(again, dg.SkipReason)
    noted = dg.materialize([module.rollout], run_config=request.run_config, raise_on_error=False)
    assert not noted.success
    assert "does not run" in str(noted.failure_data_for_node("rollout"))
