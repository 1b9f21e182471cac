"""What every test shares: offline switches, state folders of its own, owned processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts import offline
from contracts.settings import ROOT, Settings

offline.apply()
# Addresses of the developer's own services never leak into a test.
for _name in (
    "MLFLOW_TRACKING_URI",
    "QDRANT_URL",
    "RATCHET_STATE_DIR",
    "RATCHET_ROOT",
    "DAGSTER_HOME",
    "EMBEDDINGS_URL",
    "QDRANT_API_KEY",
    "EMBEDDINGS_API_KEY",
    "RAY_ADDRESS",
):
    os.environ.pop(_name, None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI=true: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages called in this process write to a folder of the session and start no tracker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("RATCHET_TRACKING", "off")
        yield


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of an empty checkout under ``tmp_path``; code still comes from this repository."""
    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path))
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / ".ratchet"))
    monkeypatch.delenv("RATCHET_TRACKING")
    for name in ("POSTGRES_URL", "REDIS_URL", "RATCHET_KEYS_SECRET"):  # tests/servers.py reads two
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow exports it itself; so it is put back
    return Settings.from_env()


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--snapshot-update", action="store_true", help="write snapshots anew")
