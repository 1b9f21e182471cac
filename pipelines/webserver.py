"""Dagster's web server with one route more: the HTML reports that assets link.

Same arguments as ``python -m dagster_webserver``. Dagster shows a file's path as text to copy, and
has no setting to serve files; one route before its own catch-all is all that is added.
``tests/e2e/test_dagster_ui.py`` clicks on it.
"""

from __future__ import annotations

from dagster_webserver import app, cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from assets.reports import report_files, report_url
from contracts.settings import Settings
from resources.report import html_report

#: The pages hold text of documents, escaped. Should one slip through, no script runs beside the UI.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def report(request: Request) -> Response:
    """The report of one asset as it is on disk now; 404 where there is none."""
    asset = request.path_params["asset"]
    file = report_files(Settings.from_env()).get(asset)
    try:
        if file is not None:
            return HTMLResponse(file.read_bytes(), headers=HEADERS)
        said = f"The asset {asset!r} has no report."
    except FileNotFoundError:
        said = f"{file} was not written yet. Next: materialize {asset!r}."
    return HTMLResponse(html_report("No report", [said]), status_code=404, headers=HEADERS)


class Webserver(DagsterWebserver):  # type: ignore[type-arg]
    """Dagster's web server, reports included."""

    def build_static_routes(self) -> list[BaseRoute]:
        own = [Route(report_url("{asset}"), report)]
        return own + super().build_static_routes()  # type: ignore[no-untyped-call,no-any-return]


def main() -> None:
    setattr(app, DagsterWebserver.__name__, Webserver)  # which its one factory makes
    cli.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
