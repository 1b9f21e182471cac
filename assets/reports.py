"""The HTML reports that assets write, and the address at which the UI's own server shows them.

A path in the metadata can only be copied, and browsers follow no ``file:`` link from a page, so
``pipelines.webserver`` serves exactly these files, at ``/reports/<asset>/report.html``. The address
is relative: it holds behind any host and port. Pages may link each other by ``../<asset>/``.
"""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from contracts.settings import Settings

#: Stages whose output holds a ``report.html``.
STAGES = ("quality", "acceptance", "retrieval", "index_sweep", "gate", "profile")


def report_files(settings: Settings) -> dict[str, Path]:
    """Asset to the file of its report, whether that was written yet or not."""
    found = {name: settings.root / "data" / name / "report.html" for name in STAGES}
    return found | {"published_index": settings.state_dir / "change.html"}


def report_url(asset: str) -> str:
    """Where the UI's server shows the report of ``asset``."""
    return f"/reports/{asset}/report.html"


def report_link(asset: str) -> dg.UrlMetadataValue:
    """The report as a link in metadata."""
    return dg.MetadataValue.url(report_url(asset))


def with_report(description: str | None, asset: str) -> str:
    """A description (Markdown) that ends with the link: it stands high on the asset's page."""
    return f"{description or ''}\n\n[Open the report]({report_url(asset)})".strip()
