"""What every test shares: offline switches, state folders of its own, owned processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts import offline
from contracts.settings import ROOT, Settings

#: How a file says that it has slow tests.
SLOW = "mark.slow"

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
    "JUDGE_URL",
    "JUDGE_API_KEY",
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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m slow`` imports only the third of the files that has slow tests."""
    if config.getoption("markexpr") != "slow" or not collection_path.match("test_*.py"):
        return None
    return SLOW not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and SLOW not in item.path.read_text(encoding="utf-8"):
            raise pytest.UsageError(f"{item.nodeid} is slow and its file does not say {SLOW}")


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
