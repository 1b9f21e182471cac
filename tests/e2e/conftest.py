"""One small real run, shared by the tests of a module: DVC, Dagster, MLflow, vLLM, gateway."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator

import pytest

from pipelines import up
from pipelines.processes import Service
from tests.e2e.workspace import SMALL, Workspace, make_workspace


@pytest.fixture(scope="module")
def lifecycle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A checkout in which every job has run and a release is deployed."""
    workspace = make_workspace(tmp_path_factory.mktemp("e2e") / "a checkout", SMALL)
    try:
        workspace.run("dvc", "pull", "base_model")
        for source in ("docs", "typer"):
            workspace.job("sources", source)
        workspace.job("lifecycle")
        workspace.job("deploy")
        yield workspace
    finally:
        workspace.run("serving.deploy", "down", "--all", check=False)


def tokens_flow(url: str) -> bool:
    """Whether the gateway says that it is ready."""
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5) as response:
            return int(response.status) == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def gateway(lifecycle: Workspace) -> Iterator[str]:
    """The URL of a gateway in front of the deployed release."""
    (service,) = [item for item in up.services(lifecycle.settings) if item.name == "gateway"]
    service = Service(
        service.name, service.command, service.url, service.log, service.cwd, lifecycle.variables
    )
    service.start()
    try:
        service.wait_ready(up.READY_SECONDS)
        deadline = time.monotonic() + 120
        while not tokens_flow(lifecycle.settings.gateway_url):
            assert time.monotonic() < deadline, service.log.read_text()[-3000:]
            time.sleep(0.2)
        yield lifecycle.settings.gateway_url
    finally:
        service.stop()
