"""The fixture as assets: a snapshot of the graph, the translator, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dvc_fixture import definitions, edit, make_project

from dagster_dvc import (
    DagsterDvcTranslator,
    DvcProject,
    InvalidProject,
    LocalRunner,
    ProjectNotFound,
    dvc_assets,
)
from dagster_dvc.assets import partition_mapping
from dagster_dvc.manifest import Stage


def specs(assets: list[dg.AssetsDefinition]) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for one in assets for spec in one.specs}


def shape(spec: dg.AssetSpec) -> dict[str, Any]:
    """What a reviewer should see change."""
    found: dict[str, Any] = {
        "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
        "group": spec.group_name,
        "kinds": sorted(spec.kinds),
        "owners": list(spec.owners),
    }
    if spec.partitions_def is not None:
        found["partitions"] = list(spec.partitions_def.get_partition_keys())
    return found


SNAPSHOT = {
    "words": {
        "deps": ["raw/a.txt", "raw/b.txt"],
        "group": "text",
        "kinds": ["bash", "dvc"],
        "owners": ["team:words", "a@example.com"],
        "partitions": ["a", "b"],
    },
    "merged": {"deps": ["words"], "group": "text", "kinds": ["dvc"], "owners": []},
    "report": {"deps": ["merged"], "group": "reports", "kinds": ["dvc"], "owners": []},
    "score": {"deps": ["report"], "group": "reports", "kinds": ["dvc"], "owners": []},
    "raw/a.txt": {"deps": [], "group": "sources", "kinds": ["file"], "owners": []},
    "raw/b.txt": {"deps": [], "group": "sources", "kinds": ["file"], "owners": []},
}


def test_the_graph(project: DvcProject) -> None:
    assets = definitions(project)
    found = specs(assets)
    assert {key: shape(spec) for key, spec in found.items()} == SNAPSHOT
    assert {one.op.name: one.op.pool for one in assets if one.is_executable} == {
        "words": "dvc",
        "merged": "heavy",
        "report": "dvc",
        "score": "dvc",
        "observe_dvc_sources": None,
    }
    assert found["words"].description == "The words of one source, one per line."
    assert found["merged"].tags["tier"] == "gold"
    metadata = found["report"].metadata
    assert (metadata["dvc/defined_in"], metadata["dvc/params"]) == (
        "dvc.yaml:21",
        ["report", "footer"],
    )
    (mapping,) = [dep.partition_mapping for dep in found["merged"].deps]
    assert isinstance(mapping, dg.AllPartitionMapping)
    dg.Definitions(assets=assets).resolve_asset_graph()  # Dagster accepts it whole


def test_observing_gives_the_md5_that_dvc_locks(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    assets = definitions(done)
    result = dg.materialize(
        assets, instance=instance, selection=dg.AssetSelection.assets(dg.AssetKey(["raw", "a.txt"]))
    )
    (event,) = result.get_asset_observation_events()
    observed = event.asset_observation_data.asset_observation
    assert observed.asset_key == dg.AssetKey(["raw", "a.txt"])
    assert observed.data_version == done.lock()["words@a"].deps["raw/a.txt"].md5


class Renaming(DagsterDvcTranslator):
    """Overrides one method each of what people disagree with."""

    def get_asset_key(self, stage: Stage) -> dg.AssetKey:
        return dg.AssetKey(["shop", stage.name])

    def get_group_name(self, stage: Stage) -> str | None:
        return "everything"

    def get_source_key(self, path: str) -> dg.AssetKey:
        return dg.AssetKey(["files", Path(path).stem])

    def is_code(self, path: str, project: DvcProject) -> bool:
        return False

    def get_metadata(self, stage: Stage) -> Mapping[str, Any]:
        return {**super().get_metadata(stage), "link": "x"}


def test_a_translator_decides_everything(project: DvcProject) -> None:
    found = specs(definitions(project, translator=Renaming()))
    assert set(found) == {
        "shop/words", "shop/merged", "shop/report", "shop/score",
        "files/a", "files/b", "files/words", "files/merge",
    }  # fmt: skip
    assert shape(found["shop/merged"])["deps"] == ["files/merge", "shop/words"]
    assert found["shop/score"].group_name == "everything"
    assert found["shop/score"].metadata["link"] == "x"


def test_a_renamed_asset_is_synced_under_its_name(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    from dagster_dvc import sync

    assert "words@a" in sync(done, instance, Renaming()).materialized
    record = instance.get_latest_materialization_event(dg.AssetKey(["shop", "merged"]))
    assert record is not None


def two(down: list[str], up: list[str]) -> tuple[Stage, Stage]:
    def stage(name: str, keys: list[str]) -> Stage:
        return Stage(name, tuple(keys), dict.fromkeys(keys or [None]))  # type: ignore[arg-type]

    return stage("down", down), stage("up", up)


@pytest.mark.parametrize(
    ("down", "up", "pairs", "expected"),
    [
        ([], [], {(None, None)}, None),
        (["a"], [], {("a", None)}, None),
        ([], ["a", "b"], {(None, "a"), (None, "b")}, dg.AllPartitionMapping()),
        ([], ["a", "b"], {(None, "b")}, dg.SpecificPartitionsPartitionMapping(["b"])),
        (["a", "b"], ["a", "b"], {("a", "a"), ("b", "b")}, dg.IdentityPartitionMapping()),
        (
            ["x", "y"],
            ["a"],
            {("x", "a"), ("y", "a")},
            dg.AllPartitionMapping(),
        ),
        (
            ["x", "y"],
            ["a", "b"],
            {("x", "a"), ("x", "b"), ("y", "b")},
            dg.StaticPartitionMapping({"a": {"x"}, "b": {"x", "y"}}),
        ),
    ],
)
def test_partition_mappings(
    down: list[str],
    up: list[str],
    pairs: set[tuple[str | None, str | None]],
    expected: dg.PartitionMapping | None,
) -> None:
    assert partition_mapping(*two(down, up), pairs) == expected


def test_every_offender_is_named_with_place_and_advice(tmp_path: Path) -> None:
    project = make_project(
        tmp_path / "project",
        {
            "dvc.yaml": """
stages:
  two-outputs:
    cmd: "true"
    outs: [a.txt, b.txt]
  config:
    cmd: "true"
    outs: [c.txt]
  typo:
    meta: {dagster: {gruop: x, owners: [nobody]}}
    cmd: "true"
    outs: [d.txt]
  owner:
    meta: {dagster: {owners: [nobody]}}
    cmd: "true"
    outs: [e.txt]
  chain:
    foreach: {one: {from: seed.txt}, two: {from: chain-one.txt}}
    do:
      cmd: cp ${item.from} chain-${key}.txt
      deps: ["${item.from}"]
      outs: ["chain-${key}.txt"]
  keys:
    foreach: [a...b]
    do:
      cmd: "true"
      outs: ["k.txt"]
  seed:
    cmd: "true"
    deps: [seed]
    outs: [s.txt]
""",
            "seed": "x",
            "seed.txt": "x",
        },
    )
    with pytest.raises(InvalidProject) as caught:
        definitions(project)
    assert caught.value.offences[0].where == "dvc.yaml:3"
    text = str(caught.value)
    for expected in (
        "stage 'two-outputs' has 2 cached outputs: a.txt, b.txt",
        "rename the stage to 'two_outputs'",
        "'config' is a word that Dagster or Python reserves",
        "meta.dagster has 'gruop'",
        "did you mean 'group'?",
        "stage 'owner': Dagster refuses it: Invalid owner 'nobody'",
        "stage 'chain@two' reads chain@one",
        "its key 'a...b' is no partition key",
        "source 'seed' and stage 'seed' are both the asset 'seed'",
    ):
        assert expected in text, text
    assert text.startswith("8 problems in the DVC project:")
    assert text.count("\n    -> ") == len(caught.value.offences)


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProjectNotFound, match=r"no dvc\.yaml"):
        DvcProject(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(ProjectNotFound, match="dvc init"):
        DvcProject(tmp_path)


def test_code_is_part_of_the_version_and_data_is_a_source(done: DvcProject) -> None:
    before = done.code_version("merged")
    (done.root / "raw/a.txt").write_text("changed\n")
    assert done.code_version("merged") == before
    edit(done.root / "code/merge.sh", "set -eu", "set -e")
    assert done.code_version("merged") != before


def test_reading_a_metric_makes_it_part_of_the_version(done: DvcProject) -> None:
    md5 = done.lock()["merged"].outs["out/merged"].md5
    assert done.data_version("merged") == md5
    edit(
        done.root / "dvc.yaml",
        "deps: [out/report.txt]",
        "deps: [out/report.txt, out/metrics/merged.json]",
    )
    version = done.data_version("merged")
    assert version is not None and version.startswith(md5 + "+")


def test_a_stage_names_its_runner(project: DvcProject) -> None:
    edit(project.root / "dvc.yaml", "pool: heavy", "pool: heavy, runner: gpu")
    with pytest.raises(InvalidProject, match=r"no runner is named 'gpu'.*given: none"):
        definitions(project)
    found = dvc_assets(project, runner=LocalRunner(), runners={"gpu": LocalRunner()})
    assert len(found) == 5


def test_parameters_that_the_run_cache_ignores_are_warned_of(
    project: DvcProject, caplog: pytest.LogCaptureFixture
) -> None:
    definitions(project)
    assert not caplog.records
    edit(project.root / "params.yaml", "title: Words", "title: Words\n  deep: [{size: 1}]")
    definitions(project)
    (record,) = caplog.records
    assert "stage 'report' has parameters named size" in record.getMessage()
