"""The page of the stage acceptance: the chunks' contract, and what changed since the last version.

In: the report and both profiles. Out: one self-contained HTML page.
"""

from __future__ import annotations

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
from stages.acceptance_profile import pooled

Row = dict[str, Any]


_COLUMNS = ["source", "documents", "chunks", "documents before", "chunks before"]


def page(report: Row, before: Row | None, now: Row) -> str:
    """The HTML page."""
    rows = [
        [row["expectation"], row["over"], row["observed"], _verdict(row["success"])]
        for row in report["expectations"]
    ]
    return html_report(
        "Change of the knowledge base" if before else "Acceptance of the knowledge base",
        [
            section(
                "Against the version published last" if before else "What there is",
                image(counts_picture(before, now), "documents by source, before and now"),
                image(shapes_picture(before, now), "distributions, before and now"),
                table(counts(before, now), _COLUMNS[: 5 if before else 3]),
            ),
            section("Expectations", table(rows, ["expectation", "over", "observed", "holds"])),
        ],
        badge("PASS" if report["success"] else "FAIL", report["success"]),
    )


def _verdict(success: bool) -> str:
    return badge("yes" if success else "no", success)


def counts(before: Row | None, now: Row) -> list[list[Any]]:
    """Documents and chunks of each source now and, if there was one, in the version before.

    None where a version does not have the source.
    """
    old = before["sources"] if before else {}
    rows = []
    for name in sorted({*old, *now["sources"]}):
        new = now["sources"].get(name, {})
        was = old.get(name, {})
        row = [name, new.get("documents"), new.get("chunks")]
        rows.append(row + ([was.get("documents"), was.get("chunks")] if before else []))
    return rows


def counts_picture(before: Row | None, now: Row) -> bytes:
    """Documents of each source, before and now."""
    rows = counts(before, now)[::-1]
    figure = new_figure(9, 1.4 + 0.5 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    width = 0.38 if before else 0.7
    if before:
        was = axes.barh([n - 0.2 for n in places], [row[3] or 0 for row in rows], width)
        was.set_label("published last")
        _paint(was, COLOURS[5])
        axes.bar_label(was, labels=[f"{row[3] or 0:,}" for row in rows], padding=3)
    new = axes.barh(
        [n + (0.2 if before else 0) for n in places], [row[1] or 0 for row in rows], width
    )
    new.set_label("now")
    _paint(new, COLOURS[0])
    axes.bar_label(new, labels=[f"{row[1] or 0:,}" for row in rows], padding=3)
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.set_xlabel("documents")
    axes.margins(x=0.12)
    axes.locator_params(axis="x", integer=True)
    if before:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure_png(figure)


def _paint(bars: Any, colour: str) -> None:
    for bar in bars:
        bar.set_facecolor(colour)


def shapes_picture(before: Row | None, now: Row) -> bytes:
    """Shares of document lengths and of chunk sizes, over the sources that both versions have."""
    names = set(now["sources"]) & set(before["sources"]) if before else set(now["sources"])
    limit = now["chunking"]["max_tokens"]
    figure = new_figure(9, 2.8)
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("lengths", "tokens"),
        ("characters of a document (from)", "tokens of a chunk (from)"),
        strict=True,
    ):
        both = [(now, COLOURS[0], "now")]
        if before:
            both.insert(0, (before, COLOURS[5], "published last"))
        bins = sorted({int(b) for value, _, _ in both for b in pooled(value, names, key)})
        for number, (value, colour, word) in enumerate(both):
            seen = pooled(value, names, key)
            total = max(1, seen.total())
            width = 0.8 / len(both)
            places = [n + (number - (len(both) - 1) / 2) * width for n in range(len(bins))]
            heights = [seen[str(b)] / total for b in bins]
            axes.bar(places, heights, width, color=colour, label=word)
        texts = [f"{2**b:,}" if key == "lengths" else str(b * limit // 8 + 1) for b in bins]
        axes.set_xticks(range(len(bins)), texts, rotation=60 if len(bins) > 6 else 0)
        axes.set_xlabel(label)
        axes.set_ylabel("share")
        if before:
            axes.legend(frameon=False)
    return figure_png(figure)
