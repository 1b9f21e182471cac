"""The Dagster UI in a real browser: lineage is seen, work is launched, a report is opened."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
import yaml

from pipelines import up
from pipelines.instance import prepare_home
from tests.browser import need_browser, open_page
from tests.e2e.workspace import SMALL, Workspace, make_workspace

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Webserver and daemon, as `ratchet up` starts them, over a checkout with nothing made yet."""
    need_browser()
    workspace = make_workspace(tmp_path_factory.mktemp("ui") / "a checkout", SMALL)
    before = os.environ.get("DAGSTER_HOME")
    prepare_home(workspace.settings)
    services = [
        dataclasses.replace(service, env=workspace.env)
        for service in up.services(workspace.settings)
        if service.name.startswith("dagster-")
    ]
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


@pytest.fixture(scope="module")
def home(ui: Workspace) -> str:
    """The address of the UI."""
    return f"http://{ui.settings.host}:{ui.settings.dagster_port}"


@pytest.fixture
def page(ui: Workspace) -> Iterator[Page]:
    """A page of a browser of its own."""
    with open_page() as page:
        yield page


def until(page: Page, true: Callable[[], Any], what: str, seconds: float = 180) -> None:
    """Poll, while the page lives on; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        page.wait_for_timeout(250)


def test_lineage_is_seen_and_a_materialization_launched(
    ui: Workspace, home: str, page: Page, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page.goto(f"{home}/asset-groups")
    for group in ("knowledge", "model", "evaluation", "release", "monitoring"):
        expect(page.get_by_text(group, exact=True).first).to_be_visible()
    page.screenshot(path=str(tmp_path / "lineage.png"))
    page.goto(f"{home}/assets/prompts")
    page.get_by_role("button", name="Materialize", exact=False).first.click()
    out = ui.root / "data" / "prompts.json"
    until(page, out.exists, "the launched run made nothing")
    page.goto(f"{home}/assets/prompts?view=events")
    expect(page.get_by_text("dvc/how").first).to_be_visible()
    page.screenshot(path=str(tmp_path / "materialized.png"))


def test_an_asset_links_its_report(home: str, page: Page) -> None:
    from playwright.sync_api import expect

    page.goto(f"{home}/assets/quality")
    link = page.get_by_role("link", name="Open the report")
    expect(link).to_be_visible()
    link.evaluate("element => element.target = '_self'")  # one tab is enough here
    link.click()
    expect(page.get_by_text("Next: materialize 'quality'")).to_be_visible()


def sources_seen(root: Path) -> dict[str, Any]:
    """What is known of each source that was read: its file, DVC's entry, the runs that made it.

    Events without a run are left out: one code version is shared by all partitions, a new entry
    changes it, and the sensor `dvc_sync` then says of the others that they are still up to date.
    """
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    made = dg.DagsterInstance.get().fetch_materializations(dg.AssetKey("documents"), limit=100)
    return {
        path.stem: (
            path.stat().st_mtime_ns,
            path.read_bytes(),
            lock[f"documents@{path.stem}"],
            [one.run_id for one in made.records if one.run_id and one.partition_key == path.stem],
        )
        for path in (root / "data" / "documents").glob("*.parquet")
    }


def add_source(root: Path, key: str) -> None:
    """A folder with one document, and its entry in params.yaml."""
    (root / key).mkdir()
    (root / key / "one.md").write_text("# One\n\nA source that was added while the UI was open.\n")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["documents"]["sources"][key] = {"uri": key, "path": key}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def test_a_new_source_is_a_partition_whose_run_touches_no_other(
    ui: Workspace, home: str, page: Page
) -> None:
    from playwright.sync_api import expect

    ui.job("sources", "docs")
    instance, before = dg.DagsterInstance.get(), sources_seen(ui.root)
    assert list(before) == ["docs"]
    earlier = {run.run_id for run in instance.get_runs()}

    add_source(ui.root, "notes")
    page.goto(f"{home}/asset-groups")
    with page.expect_response(lambda answer: "mutation Reload" in str(answer.request.post_data)):
        page.get_by_role("button", name="Reload definitions").click()
    page.goto(f"{home}/assets/documents?view=partitions")
    page.get_by_text("notes", exact=True).first.click()
    expect(page.get_by_text("Missing (2)")).to_be_visible()  # typer too: nobody has read it
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="Launch 1 run").click()
    expect(page.get_by_text("Missing (1)")).to_be_visible(timeout=180_000)

    (run,) = [run for run in instance.get_runs() if run.run_id not in earlier]
    until(page, lambda: instance.get_run_by_id(run.run_id).is_finished, "the run did not end")  # type: ignore[union-attr]
    assert instance.get_run_by_id(run.run_id).is_success  # type: ignore[union-attr]
    assert run.tags["dagster/partition"] == "notes"
    told = [event.message for event in instance.all_logs(run.run_id)]
    (ran,) = [line for line in told if "Running stage" in line]
    assert "documents@notes" in ran
    after = sources_seen(ui.root)
    assert set(after) == {"docs", "notes"} and after["docs"] == before["docs"]
