"""The Dagster UI in a real browser: the lineage graph is seen, a materialization is launched."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.instance import prepare_home
from pipelines.processes import Service
from tests.e2e.workspace import SMALL, Workspace, make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Webserver and daemon over a checkout in which nothing was made yet."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install the package chromium")
    workspace = make_workspace(tmp_path_factory.mktemp("ui") / "a checkout", SMALL)
    before = os.environ.get("DAGSTER_HOME")
    prepare_home(workspace.settings)
    port = str(workspace.settings.dagster_port)
    commands = {
        "webserver": ["dagster_webserver", "-h", "127.0.0.1", "-p", port, "-w", "workspace.yaml"],
        "daemon": ["dagster._daemon", "run", "-w", "workspace.yaml"],
    }
    services = [
        Service(
            name, [sys.executable, "-m", *arguments],
            f"http://127.0.0.1:{port}/server_info" if name == "webserver" else None,
            workspace.root / f"{name}.log", workspace.root, workspace.env,
        )
        for name, arguments in commands.items()
    ]  # fmt: skip
    try:
        for service in services:
            service.start()
        for service in services:
            service.wait_ready(120)
        yield workspace
    finally:
        for service in services:
            service.stop()
        os.environ.pop("DAGSTER_HOME", None)
        if before:
            os.environ["DAGSTER_HOME"] = before


def test_lineage_is_seen_and_a_materialization_launched(ui: Workspace, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    home = f"http://127.0.0.1:{ui.settings.dagster_port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1800, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(f"{home}/asset-groups")
        for group in ("knowledge", "model", "evaluation", "release", "monitoring"):
            expect(page.get_by_text(group, exact=True).first).to_be_visible(timeout=60_000)
        page.screenshot(path=str(tmp_path / "lineage.png"))
        page.goto(f"{home}/assets/prompts")
        page.get_by_role("button", name="Materialize", exact=False).first.click()
        out = ui.root / "data" / "prompts.json"
        deadline = time.monotonic() + 180
        while not out.exists():
            assert time.monotonic() < deadline, "the launched run made nothing"
            page.wait_for_timeout(500)
        page.goto(f"{home}/assets/prompts?view=events")
        expect(page.get_by_text("dvc/how").first).to_be_visible(timeout=60_000)
        page.screenshot(path=str(tmp_path / "materialized.png"))
        browser.close()
