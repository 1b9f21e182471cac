"""The fixture project, and both drivers' opinions of it.

``fixture/`` is a small pipeline of shell commands: a ``foreach`` (``words``), a folder output with
an uncached metric (``merged``), a stage that reads one file of that folder (``report``), and one
that writes only a metric (``score``). Its ``dvc.yaml`` is kept as ``pipeline.yaml``: DVC collects
every ``dvc.yaml`` below a repository's root, and this is not part of the repository's own graph.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from dagster_dvc import (
    DagsterDvcTranslator,
    DvcProject,
    StageRequest,
    StageResult,
    StageRunner,
    dvc_assets,
)
from dagster_dvc.runner import decision
from dagster_dvc.state import State

FIXTURE = Path(__file__).with_name("fixture")
NODES = ("words@a", "words@b", "merged", "report", "score")

# Nobody's own configuration of git, DVC or the shell reaches a test.
QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.com",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.com",
    "SHELL": "/bin/sh",
}


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def dvc(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The real command line, as somebody types it in a terminal (1.3 CPU seconds)."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "dvc", *arguments],
        cwd=root,
        check=check,
        capture_output=True,
        text=True,
    )


@contextmanager
def _repo(root: Path) -> Iterator[Any]:
    """DVC as a library: 0.15 s a call instead of 1.3."""
    from dvc.repo import Repo

    before = Path.cwd()
    os.chdir(root)
    try:
        with Repo(str(root)) as repo:
            yield repo
    finally:
        os.chdir(before)


def make_project(root: Path, files: Mapping[str, str] | None = None) -> DvcProject:
    """A git and DVC repository in ``root``: the fixture, or the given files. Committed."""
    from dvc.repo import Repo

    root.mkdir(parents=True, exist_ok=True)
    if files is None:
        shutil.copytree(FIXTURE, root, dirs_exist_ok=True)
        (root / "pipeline.yaml").rename(root / "dvc.yaml")
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet", "--initial-branch", "main")
    Repo.init(str(root)).close()
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "fixture")
    return DvcProject(root)


def repro(root: Path, *targets: str, single: bool = False) -> None:
    """``dvc repro`` as a library call: what a terminal does, quickly."""
    with _repo(root) as repo:
        repo.reproduce(targets=list(targets) or None, single_item=single)


def dvc_stale(root: Path) -> set[str]:
    """The stages that ``dvc status`` lists, apart from outputs that are merely not in place.

    Dagster speaks of what ``dvc.lock`` records; whether the bytes lie in the workspace is a matter
    of ``dvc checkout``.
    """
    with _repo(root) as repo:
        return set(repo.status())


def files_stale(state: State) -> set[str]:
    """The stages that our own reading of the files finds stale."""
    return {node.name for node in state.nodes() if not state.verdict(node).fresh}


class LibraryRunner:
    """Runs a stage through DVC inside the test's process: real DVC, without its start-up."""

    name = "library"

    def run(self, request: StageRequest) -> StageResult:
        import logging

        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("dvc")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            repro(request.project.root, request.node.name, single=True)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        return StageResult(decision(request.node.name, lines) or "unchanged", 0.0)


def definitions(
    project: DvcProject,
    runner: StageRunner | None = None,
    translator: DagsterDvcTranslator | None = None,
) -> list[dg.AssetsDefinition]:
    return dvc_assets(project, translator, runner or LibraryRunner())


def materialize(
    assets: list[dg.AssetsDefinition],
    instance: dg.DagsterInstance,
    name: str,
    partition: str | None = None,
    *,
    raise_on_error: bool = True,
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        instance=instance,
        selection=dg.AssetSelection.assets(name),
        partition_key=partition,
        raise_on_error=raise_on_error,
    )


def materialize_all(assets: list[dg.AssetsDefinition], instance: dg.DagsterInstance) -> None:
    """Every stage of the fixture, upstream first."""
    for name in NODES:
        asset, _, key = name.partition("@")
        assert materialize(assets, instance, asset, key or None).success


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """The metadata of the one materialization of a run."""
    (event,) = result.get_asset_materialization_events()
    return {key: value.value for key, value in event.materialization.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> Any:
    """The failure data of the one failed step of a run."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    return event.step_failure_data


def dagster_stale(project: DvcProject, instance: dg.DagsterInstance) -> set[str]:
    """The stages that Dagster shows as stale or missing, its definitions freshly loaded."""
    assets = definitions(project)
    graph = dg.Definitions(assets=assets).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    found = set()
    for name in NODES:
        asset, _, key = name.partition("@")
        status = resolver.get_status(dg.AssetKey(asset), key or None)
        if status.value != "FRESH":
            found.add(name)
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll with a deadline."""
    import time

    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
