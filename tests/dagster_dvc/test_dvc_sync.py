"""What the sync sensor decides: a pure function, and the sensor around it."""

from __future__ import annotations

import json
import threading
from typing import Any

import dagster as dg
import pytest
from dvc_fixture import edit, repro

from dagster_dvc import DvcProject, dvc_sync_sensor, lockfile
from dagster_dvc.sync import FULL_CHECK_S, Node, Plan, Recorded, Seen, decide, due

SOURCE, UP, DOWN = dg.AssetKey("source"), dg.AssetKey("up"), dg.AssetKey("down")
UP_A, UP_B, ONE = Node(UP, "a"), Node(UP, "b"), Node(DOWN)

# A world in which both sides agree: a source, an upstream of two partitions, a downstream.
RECORDED = {
    UP_A: Recorded("1", True, {SOURCE: True}),
    UP_B: Recorded("2", True, {SOURCE: True}),
    ONE: Recorded("3", True, {UP: True}),
}
SEEN = {
    UP_A: Seen("1", "code-up", {SOURCE: {None: "s"}}),
    UP_B: Seen("2", "code-up", {SOURCE: {None: "s"}}),
    ONE: Seen("3", "code-down", {UP: {"a": "1", "b": "2"}}),
}
CODE = {UP: "code-up", DOWN: "code-down"}


def plan(
    recorded: dict[Node, Recorded] | None = None,
    seen: dict[Node, Seen | None] | None = None,
    source: str = "s",
    observed: str | None = "s",
) -> Plan:
    known = {node: one for node, one in {**SEEN, **(seen or {})}.items() if one is not None}
    return decide(
        {**RECORDED, **(recorded or {})}, known, CODE, {SOURCE: source}, {SOURCE: observed}
    )


def test_nothing_to_say_where_both_agree() -> None:
    assert plan() == Plan({}, {})


CASES: list[tuple[str, dict[str, Any], dict[Node, str], bool]] = [
    ("never heard of", {"seen": {UP_A: None}}, {UP_A: "not known to Dagster"}, False),
    ("never ran, never seen",
     {"recorded": {UP_A: Recorded(None, False, {})}, "seen": {UP_A: None}},
     {ONE: "consumed another up"}, False),
    ("new data", {"recorded": {ONE: Recorded("4", True, {UP: True})}}, {ONE: "other data"}, False),
    ("left the lock", {"recorded": {ONE: Recorded(None, False, {UP: False})}},
     {ONE: "no longer in dvc.lock"}, False),
    ("code ran in a terminal", {"seen": {ONE: Seen("3", "old", {UP: {"a": "1", "b": "2"}})}},
     {ONE: "code version"}, False),
    ("code changed, not run", {"recorded": {ONE: Recorded("3", False, {UP: True})},
                               "seen": {ONE: Seen("3", "old", {UP: {"a": "1", "b": "2"}})}},
     {}, False),
    ("a dependency was dropped",
     {"seen": {ONE: Seen("3", "code-down", {UP: {"a": "1", "b": "2"}, SOURCE: {None: "s"}})}},
     {ONE: "other inputs"}, False),
    ("both ran in a terminal",
     {"recorded": {UP_A: Recorded("9", True, {SOURCE: True})}},
     {UP_A: "other data", ONE: "consumed another up"}, False),
    ("only the upstream ran in a terminal",
     {"recorded": {UP_A: Recorded("9", True, {SOURCE: True}),
                   ONE: Recorded("3", True, {UP: False})}},
     {UP_A: "other data"}, False),
    ("the downstream is thought fresh and is not",
     {"recorded": {ONE: Recorded("3", True, {UP: False})}}, {ONE: "consumed another up"}, False),
    ("the source changed, nothing ran",
     {"source": "t", "recorded": {UP_A: Recorded("1", True, {SOURCE: False}),
                                  UP_B: Recorded("2", True, {SOURCE: False})}}, {}, True),
    ("the source changed, one partition does not read it",
     {"source": "t", "recorded": {UP_A: Recorded("1", True, {SOURCE: False})}},
     {UP_B: "consumed another source"}, True),
    ("the source was never observed", {"observed": None}, {}, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("world", "materialize", "observe"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_it_speaks_only_where_they_differ(
    world: dict[str, Any], materialize: dict[Node, str], observe: bool
) -> None:
    decided = plan(**world)
    assert dict(decided.materialize) == materialize
    assert bool(decided.observe) == observe


def test_upstream_comes_before_downstream() -> None:
    decided = plan(seen={UP_A: None, UP_B: None, ONE: None})
    assert list(decided.materialize) == [UP_A, UP_B, ONE]


@pytest.mark.parametrize(
    ("cursor", "expected"),
    [
        (None, True),
        ("not json", True),
        (json.dumps({"mark": "m", "at": 1000.0}), False),
        (json.dumps({"mark": "other", "at": 1000.0}), True),
        (json.dumps({"mark": "m", "at": 1000.0 - FULL_CHECK_S}), True),
    ],
)
def test_a_tick_compares_only_when_something_changed(cursor: str | None, expected: bool) -> None:
    assert due(cursor, "m", 1001.0) is expected


def tick(
    sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str | None
) -> tuple[str, str | None]:
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = sensor.evaluate_tick(context)
    assert not result.run_requests
    return str(result.skip_message), result.cursor


def test_the_sensor(done: DvcProject, instance: dg.DagsterInstance) -> None:
    sensor = dvc_sync_sensor(done, name="look", minimum_interval_seconds=7)
    assert (sensor.name, sensor.minimum_interval_seconds) == ("look", 7)
    said, cursor = tick(sensor, instance, None)
    assert said.startswith("Recorded from dvc.lock: words@a (not known to Dagster)")
    assert tick(sensor, instance, cursor) == ("Nothing has changed.", cursor)
    edit(done.root / "raw/a.txt", "one", "eleven")
    repro(done.root, "words@a", single=True)
    said, later = tick(sensor, instance, cursor)
    assert "words@a (other data)" in said and "raw/a.txt (source)" in said and later != cursor
    event = instance.get_latest_materialization_event(dg.AssetKey("words"))
    assert event is not None and event.asset_materialization is not None
    assert event.asset_materialization.metadata["dvc/how"].value == "synced"


def test_a_stage_that_runs_now_is_left_to_its_own_event(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    from dagster_dvc.checkout import Checkout

    sensor = dvc_sync_sensor(done)
    with Checkout(done).exclusive("merged", print):
        said, cursor = tick(sensor, instance, None)
    assert "words@a" in said and "merged" not in said and cursor is None
    said, cursor = tick(sensor, instance, cursor)
    assert "merged" in said and cursor is not None


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_lock_that_dvc_is_writing_is_waited_for(done: DvcProject, share: float) -> None:
    path = done.root / "dvc.lock"
    content, expected = path.read_bytes(), lockfile.read(path)
    assert expected
    path.write_bytes(content[: int(len(content) * share)].rstrip(b"\n"))
    writer = threading.Timer(0.1, path.write_bytes, [content])
    writer.start()
    assert lockfile.read(path) == expected
    writer.join()
