"""The reports that the UI's server shows beside Dagster's own routes."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from assets.reports import report_files, report_url
from contracts.settings import Settings
from pipelines.webserver import report


@pytest.fixture
def client(settings: Settings) -> TestClient:
    return TestClient(Starlette(routes=[Route(report_url("{asset}"), report)]))


def test_a_report_is_shown_as_it_stands_and_runs_no_script(
    settings: Settings, client: TestClient
) -> None:
    for asset, file in report_files(settings).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<p>{asset}</p>")
        answer = client.get(report_url(asset))
        assert (answer.status_code, answer.text) == (200, f"<p>{asset}</p>")
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_only_reports_are_served(settings: Settings, client: TestClient) -> None:
    (settings.root / "report.html").write_text("outside")
    for asset in ("nothing", "..", "%2e%2e", "..%2F..", "<script>"):
        answer = client.get(report_url(asset))
        assert answer.status_code == 404 and "outside" not in answer.text
        assert "<script" not in answer.text


def test_a_report_that_is_not_there_yet_says_what_to_do(client: TestClient) -> None:
    answer = client.get(report_url("quality"))
    assert answer.status_code == 404 and "Next: materialize" in answer.text
