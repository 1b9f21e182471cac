"""The page of the stage quality: what was accepted, what was not and why, and every expectation.

In: the report and the rows. Out: one self-contained HTML page. Great Expectations' own pages load
their styles from public addresses and are bare offline.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from resources.report import (
    COLOURS,
    badge,
    figure_png,
    html_report,
    image,
    new_figure,
    section,
    table,
)

#: Rows of quarantine that the page lists; all of them stand in quarantine.parquet.
LISTED = 50


def page(
    report: dict[str, Any], accepted: list[dict[str, Any]], quarantined: list[dict[str, Any]]
) -> str:
    """The HTML page."""
    summary = badge("PASS" if report["success"] else "FAIL", report["success"])
    rows = [
        [row["expectation"], row["over"], row["observed"], badge(*_word(row["success"]))]
        for row in report["expectations"]
    ]
    reasons = sorted(report["quarantined"].items())
    listed = [[row["doc_id"], row["problem"]] for row in quarantined[:LISTED]]
    return html_report(
        "Quality of the documents",
        [
            section(
                "Documents",
                f"{report['documents']:,} documents, {report['accepted']:,} accepted, "
                f"{len(quarantined):,} in quarantine.",
                image(picture(accepted, quarantined), "documents by source, lengths of texts"),
            ),
            section("Expectations", table(rows, ["expectation", "over rows", "observed", "holds"])),
            section(
                "Quarantine",
                table(reasons, ["reason", "documents"]) if reasons else "Nothing.",
                f"The first {len(listed)} of {len(quarantined)}:" if listed else "",
                table(listed, ["document", "reason"]) if listed else "",
            ),
        ],
        summary,
    )


def _word(success: bool) -> tuple[str, bool]:
    return ("yes", True) if success else ("no", False)


def picture(accepted: list[dict[str, Any]], quarantined: list[dict[str, Any]]) -> bytes:
    """Left: accepted and quarantined by source. Right: how long the accepted texts are."""
    figure = new_figure(9, 3)
    left, right = figure.subplots(1, 2)
    good = Counter(row["source"] for row in accepted)
    bad = Counter(row["source"] for row in quarantined)
    names = sorted(set(good) | set(bad))
    heights = [good[name] for name in names]
    rest = [bad[name] for name in names]
    left.barh(names, heights, color=COLOURS[0], label="accepted")
    bars = left.barh(names, rest, left=heights, color=COLOURS[3], label="quarantine")
    words = [f"{good[name]:,} + {bad[name]:,}" for name in names]
    left.bar_label(bars, labels=words, padding=3)
    left.margins(x=0.35)
    left.set_xlabel("documents")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    edges = [2**power for power in range(4, 19)]
    lengths = [len(row["text"]) for row in accepted]
    right.hist(lengths, bins=edges, color=COLOURS[0])
    right.set_xscale("log", base=10)
    right.set_xlabel("characters of an accepted text")
    right.set_ylabel("documents")
    return figure_png(figure)
