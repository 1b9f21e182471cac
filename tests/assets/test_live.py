"""Live assets against a real MLflow store and a real ledger."""

from __future__ import annotations

import dagster as dg
import pytest

from assets.live import registered_model
from contracts.settings import Settings
from resources import registry, releases
from resources.ledger import Ledger
from tests.serving.factory import build


@pytest.mark.slow  # MLflow's import and migrations cost 10 CPU seconds
def test_a_registered_release_has_its_verdict_in_the_ledger_and_then_the_alias(
    settings: Settings,
) -> None:
    gate = {"verdict": "PASS", "policy_sha256": "0" * 64}
    release = releases.read_release(build(settings.root, gate=gate))
    for _ in range(2):
        with dg.DagsterInstance.ephemeral() as instance:
            result = dg.materialize([registered_model], instance=instance)
        (event,) = result.asset_materializations_for_node("registered_model")
        assert event.metadata["version"].value == "1"
    policy, verdict = Ledger.open(settings).entries()
    assert (policy.kind, verdict.kind, verdict.release) == ("policy", "verdict", release.id)
    assert verdict.actor.startswith("dagster:") and verdict.body["gate"] == gate
    client = registry._client(settings)
    assert registry._release_at("candidate", client) == release.id
    assert registry._release_at("stable", client) is None  # nothing was promoted
