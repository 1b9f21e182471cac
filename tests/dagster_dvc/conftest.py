"""A fixture project, made once per session and copied for every test that wants one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from dvc_fixture import QUIET, make_project, repro

from dagster_dvc import DvcProject, _dvc_internals, manifest
from dagster_dvc.errors import ResolveFailed


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def _resolve_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve inside the test's process (0.1 s) instead of in one of its own (1 s).

    Tests marked ``real_resolver`` keep the process.
    """
    if "real_resolver" in request.fixturenames:
        return

    def ask(root: Path) -> dict[str, Any]:
        monkeypatch.chdir(root)
        try:
            answer = json.loads(json.dumps(_dvc_internals.resolve(str(root)), default=str))
        except Exception as error:
            raise ResolveFailed(str(error)) from error
        return dict(answer)

    monkeypatch.setattr(manifest, "_ask_dvc", ask)


@pytest.fixture
def real_resolver() -> None:
    """Ask for the resolver's own process."""


@pytest.fixture(scope="session")
def _templates(tmp_path_factory: pytest.TempPathFactory, _quiet: None) -> dict[str, Path]:
    fresh = tmp_path_factory.mktemp("template") / "fresh"
    project = make_project(fresh)
    manifest.load(project.root)  # leaves the manifest to be copied
    done = fresh.with_name("done")
    shutil.copytree(fresh, done, symlinks=True)
    repro(done)
    return {"fresh": fresh, "done": done}


@pytest.fixture
def project(_templates: dict[str, Path], tmp_path: Path) -> DvcProject:
    """The fixture project, nothing run yet."""
    shutil.copytree(_templates["fresh"], tmp_path / "project", symlinks=True)
    return DvcProject(tmp_path / "project")


@pytest.fixture
def done(_templates: dict[str, Path], tmp_path: Path) -> DvcProject:
    """The fixture project after a ``dvc repro``."""
    shutil.copytree(_templates["done"], tmp_path / "done", symlinks=True)
    return DvcProject(tmp_path / "done")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as one:
        yield one
