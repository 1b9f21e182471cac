"""Dagster's staleness, our reading of the files, and ``dvc status`` agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from dvc_fixture import (
    NODES,
    dagster_stale,
    definitions,
    dvc_stale,
    edit,
    files_stale,
    materialize,
    materialize_all,
    repro,
)

from dagster_dvc import DvcProject, sync


def agreed(project: DvcProject, instance: dg.DagsterInstance) -> set[str]:
    """The stale stages, by three witnesses that have to agree."""
    by_dvc = dvc_stale(project.root)
    assert files_stale(project.state()) == by_dvc
    assert dagster_stale(project, instance) == by_dvc
    return by_dvc


@pytest.mark.slow
def test_everything_is_missing_at_first(project: DvcProject, instance: dg.DagsterInstance) -> None:
    assert agreed(project, instance) == set(NODES)


def test_after_a_run_everything_is_fresh(project: DvcProject, instance: dg.DagsterInstance) -> None:
    materialize_all(definitions(project), instance)
    assert agreed(project, instance) == set()


def change_param(root: Path) -> None:
    edit(root / "params.yaml", "title: Words", "title: All words")


def change_unused_param(root: Path) -> None:
    edit(root / "params.yaml", "sources:", "unused: 1\nsources:")


def change_param_of_another_file(root: Path) -> None:
    edit(root / "settings.yaml", "the end", "The End")


def change_number_spelling(root: Path) -> None:
    edit(root / "params.yaml", "1e-5", "0.00001")


def change_shared_param(root: Path) -> None:
    edit(root / "params.yaml", "upper: true", "upper: false")


def change_source(root: Path) -> None:
    (root / "raw/b.txt").write_text("six\n")


def change_code(root: Path) -> None:
    edit(root / "code/merge.sh", "set -eu", "set -e -u")


def change_command(root: Path) -> None:
    edit(root / "dvc.yaml", 'echo "lines: ', 'echo "count: ')


def change_description(root: Path) -> None:
    edit(root / "dvc.yaml", "All words, sorted.", "Sorted words.")
    edit(root / "dvc.yaml", "tier: gold", "tier: silver")


def change_one_key(root: Path) -> None:
    (root / "raw/c.txt").write_text("seven\n")
    edit(root / "params.yaml", "b: raw/b.txt", "b: raw/c.txt")


def add_dependency(root: Path) -> None:
    edit(root / "dvc.yaml", "deps: [out/report.txt]", "deps: [out/report.txt, settings.yaml]")


def drop_dependency(root: Path) -> None:
    edit(root / "dvc.yaml", "out/words/b.txt, code/merge.sh]", "out/words/b.txt]")


def touch_without_change(root: Path) -> None:
    path = root / "raw/a.txt"
    path.write_bytes(path.read_bytes())


CHANGES: list[tuple[Callable[[Path], None], set[str]]] = [
    (change_param, {"report"}),
    (change_unused_param, set()),
    (change_param_of_another_file, {"report"}),
    (change_number_spelling, set()),
    (change_shared_param, {"words@a", "words@b"}),
    (change_source, {"words@b"}),
    (change_code, {"merged"}),
    (change_command, {"score"}),
    (change_description, set()),
    (change_one_key, {"words@b"}),
    (add_dependency, {"score"}),
    (drop_dependency, set()),
    (touch_without_change, set()),
]


IN_THE_FAST_HALF = {change_shared_param, change_source, change_description, change_one_key}


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        pytest.param(
            change,
            stale,
            id=change.__name__,
            marks=() if change in IN_THE_FAST_HALF else pytest.mark.slow,
        )
        for change, stale in CHANGES
    ],
)
def test_a_change_makes_the_same_stages_stale(
    done: DvcProject,
    instance: dg.DagsterInstance,
    change: Callable[[Path], None],
    stale: set[str],
) -> None:
    sync(done, instance)
    assert dagster_stale(done, instance) == set()
    change(done.root)
    sync(done, instance)  # observes sources, and sees which keys of a foreach did not change
    assert agreed(done, instance) == stale


@pytest.mark.slow
def test_running_the_stale_stage_moves_staleness_downstream(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    change_source(done.root)
    materialize(definitions(done), instance, "words", "b")
    # Dagster knows inputs of assets, not of partitions: until the sync it suspects `words@a`.
    assert dagster_stale(done, instance) == {"words@a", "merged"}
    sync(done, instance)
    assert agreed(done, instance) == {"merged"}
    materialize(definitions(done), instance, "merged")
    assert agreed(done, instance) == {"report"}


@pytest.mark.slow
def test_a_folder_that_changes_elsewhere_leaves_readers_of_one_file_fresh(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    edit(done.root / "code/merge.sh", "made of", "built of")  # about.txt, not words.txt
    materialize(definitions(done), instance, "merged")
    sync(done, instance)
    assert agreed(done, instance) == set()


@pytest.mark.slow
def test_reverting_restores_from_the_run_cache(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    change_param(done.root)
    materialize(definitions(done), instance, "report")
    assert agreed(done, instance) == {"score"}
    edit(done.root / "params.yaml", "title: All words", "title: Words")
    assert "report" in agreed(done, instance)
    result = materialize(definitions(done), instance, "report")
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["dvc/how"].value == "run_cache"
    assert agreed(done, instance) == set()


def test_a_terminal_run_is_fresh_after_a_sync(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    change_source(done.root)
    change_param(done.root)
    repro(done.root)
    assert dagster_stale(done, instance) != set()  # not yet: only the sync tells Dagster
    sync(done, instance)
    assert agreed(done, instance) == set()
    assert str(sync(done, instance)) == "Dagster and DVC agree."


@pytest.mark.slow
def test_a_partial_terminal_run_leaves_the_rest_stale(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    change_shared_param(done.root)
    repro(done.root, "words@a", single=True)
    sync(done, instance)
    assert agreed(done, instance) == {"words@b", "merged"}


@pytest.mark.slow
def test_a_terminal_run_between_two_dagster_runs_is_not_mistaken(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    """The upstream ran in a terminal, unseen; the downstream in Dagster consumed its result."""
    sync(done, instance)
    change_source(done.root)
    repro(done.root, "words@b", single=True)
    materialize(definitions(done), instance, "merged")
    sync(done, instance)
    assert agreed(done, instance) == {"report"}


@pytest.mark.slow
def test_upstream_ran_again_behind_dagsters_back(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    """Both ran in a terminal, then the upstream once more: the downstream is stale."""
    sync(done, instance)
    change_source(done.root)
    repro(done.root, "words@b", single=True)
    repro(done.root, "merged", single=True)
    (done.root / "raw/b.txt").write_text("nine\n")
    repro(done.root, "words@b", single=True)
    sync(done, instance)
    assert agreed(done, instance) == {"merged", "report"}
    assert str(sync(done, instance)) == "Dagster and DVC agree."


@pytest.mark.slow
def test_a_failed_stage_stays_stale_and_nothing_else(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    edit(done.root / "code/merge.sh", "set -eu", "exit 3")
    result = materialize(definitions(done), instance, "merged", raise_on_error=False)
    assert not result.success
    assert not (done.root / "out/merged").exists()  # the library runner puts nothing back
    assert dagster_stale(done, instance) == {"merged"} == files_stale(done.state())


def test_an_entry_that_left_the_lock_is_stale(
    done: DvcProject, instance: dg.DagsterInstance
) -> None:
    sync(done, instance)
    (done.root / "dvc.lock").unlink()
    sync(done, instance)
    assert agreed(done, instance) == set(NODES)
