"""The page of the stage quality: what was accepted, what was not and why, and every expectation.

In: the report and the rows. Out: one self-contained HTML page. Great Expectations' own pages load
their styles from public addresses and are bare offline. Personal data is never printed: the report
holds it masked.
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

Row = dict[str, Any]

#: Rows of quarantine that the page lists; all of them stand in quarantine.parquet.
LISTED = 50
#: Languages that the picture tells apart; the rest is "other".
TOLD_APART = 5


def page(report: Row, accepted: list[Row], quarantined: list[Row]) -> str:
    """The HTML page."""
    summary = badge("PASS" if report["success"] else "FAIL", report["success"])
    return html_report(
        "Quality of the documents",
        [
            section(
                "Documents",
                f"{report['documents']:,} documents, {report['accepted']:,} accepted, "
                f"{len(quarantined):,} in quarantine.",
                image(documents_picture(accepted, quarantined), "documents by source; lengths"),
            ),
            section("Expectations", expectations_table(report["expectations"])),
            defects(report, quarantined),
            copies(report),
            personal_data(report),
            section(
                "Languages",
                "Of accepted prose, as the parser's detector says; code and texts too short to "
                "tell are left out. Allowed: " + (", ".join(report["languages"]) or "all") + ".",
                image(languages_picture(accepted), "share of each language by source"),
            ),
        ],
        summary,
    )


def expectations_table(rows: list[Row]) -> str:
    """A row for each expectation: what it demands, over which rows, what was seen."""
    return table(
        [
            [row["expectation"], row["over"], row["observed"], badge(*_word(row["success"]))]
            for row in rows
        ],
        ["expectation", "over rows", "observed", "holds"],
    )


def _word(success: bool) -> tuple[str, bool]:
    return ("yes", True) if success else ("no", False)


def defects(report: Row, quarantined: list[Row]) -> str:
    """Quarantine by reason and source, and its first rows."""
    if not quarantined:
        return section("Quarantine", "Nothing.")
    listed = [[row["doc_id"], row["problem"]] for row in quarantined[:LISTED]]
    return section(
        "Quarantine",
        image(defects_picture(report["quarantined_by_source"]), "quarantine by reason and source"),
        table(sorted(report["quarantined"].items()), ["reason", "documents"]),
        f"The first {LISTED} of {len(quarantined):,}:"
        if len(quarantined) > LISTED
        else "All of them:",
        table(listed, ["document", "reason"]),
    )


def copies(report: Row) -> str:
    """Families of near copies, and lines that many documents share."""
    families = sorted(report["near_copies"], key=lambda item: (-len(item["copies"]), item["kept"]))
    rows = [
        [
            family["kept"],
            len(family["copies"]),
            max(item["jaccard"] for item in family["copies"]),
            ", ".join(item["doc_id"] for item in family["copies"][:3]),
        ]
        for family in families[:LISTED]
    ]
    lines = [[item["line"], item["documents"]] for item in report["boilerplate"]]
    return section(
        "Near copies and boilerplate",
        image(families_picture(report["near_copies"]), "similarity of copies; family members")
        if rows
        else "No text is a near copy of another.",
        table(rows, ["stays", "copies", "most alike", "such as"]) if rows else "",
        table(lines, ["line that many documents share", "documents"]) if lines else "",
    )


def personal_data(report: Row) -> str:
    """Personal data and secrets by kind and policy, with masked samples, and leaked questions."""
    seen = report["pii_seen"]
    leaks = report["leaks"]
    return section(
        "Personal data, secrets, leaked questions",
        image(pii_picture(report["pii"]), "documents with personal data by kind")
        if seen
        else "No personal data and no secret was found.",
        table(report["pii"], ["kind", "policy", "documents", "spans"]),
        f"{report['redacted']:,} accepted documents were masked; masks keep the length, so "
        "offsets stay true.",
        table(seen, ["kind", "doc_id", "line", "masked"]) if seen else "",
        table(leaks, ["question", "doc_id", "kind", "detail"])
        if leaks
        else "No golden question stands in a document.",
    )


def documents_picture(accepted: list[Row], quarantined: list[Row]) -> bytes:
    """Left: accepted and quarantined by source. Right: how long the accepted texts are."""
    good = Counter(row["source"] for row in accepted)
    bad = Counter(row["source"] for row in quarantined)
    names = sorted(set(good) | set(bad), reverse=True)
    figure = new_figure(9, max(3.0, 1.5 + 0.35 * len(names)))
    left, right = figure.subplots(1, 2)
    heights = [good[name] for name in names]
    rest = [bad[name] for name in names]
    left.barh(names, heights, color=COLOURS[0], label="accepted")
    bars = left.barh(names, rest, left=heights, color=COLOURS[3], label="quarantine")
    words = [f"{good[name]:,} + {bad[name]:,}" for name in names]
    left.bar_label(bars, labels=words, padding=3)
    left.margins(x=0.35)
    left.set_xlabel("documents")
    left.locator_params(axis="x", integer=True)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    edges = [2**power for power in range(4, 19)]
    right.hist([len(row["text"]) for row in accepted], bins=edges, color=COLOURS[0])
    right.set_xscale("log", base=10)
    right.set_xlabel("characters of an accepted text")
    right.set_ylabel("documents")
    right.locator_params(axis="y", integer=True)
    return figure_png(figure)


def defects_picture(by_source: dict[str, dict[str, int]]) -> bytes:
    """A bar for each reason, parted by source."""
    reasons = sorted({reason for counts in by_source.values() for reason in counts}, reverse=True)
    figure = new_figure(9, 1.6 + 0.35 * len(reasons))
    axes = figure.subplots()
    begin = [0] * len(reasons)
    for number, (source, counts) in enumerate(sorted(by_source.items())):
        widths = [counts.get(reason, 0) for reason in reasons]
        colour = COLOURS[number % len(COLOURS)]
        bars = axes.barh(reasons, widths, 0.6, left=begin, color=colour, label=source)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    axes.bar_label(bars, labels=[f"{total:,}" for total in begin], padding=3)
    axes.margins(x=0.12)
    axes.set_ylim(-0.6, len(reasons) - 0.4)
    axes.set_xlabel("documents in quarantine")
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
    return figure_png(figure)


def families_picture(families: list[Row]) -> bytes:
    """Left: how alike near copies are to what stays. Right: members of a family."""
    figure = new_figure(9, 2.8)
    left, right = figure.subplots(1, 2)
    values = [item["jaccard"] for family in families for item in family["copies"]]
    left.hist(values, bins=20, range=(min([0.8, *values]), 1.0), color=COLOURS[0])
    left.locator_params(axis="x", nbins=5)
    left.set_xlabel("similarity to the text that stays (Jaccard)")
    left.set_ylabel("near copies")
    left.locator_params(axis="y", integer=True)
    members = Counter(len(family["copies"]) for family in families)
    right.bar(
        [str(n) for n in sorted(members)], [members[n] for n in sorted(members)], color=COLOURS[2]
    )
    right.set_xlabel("near copies in a family")
    right.set_ylabel("families")
    right.locator_params(axis="y", integer=True)
    return figure_png(figure)


def pii_picture(rows: list[Row]) -> bytes:
    """Documents with each kind of personal data, coloured by what the policy does."""
    colours = {"report": COLOURS[0], "redact": COLOURS[1], "block": COLOURS[3]}
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    kinds = [row["kind"] for row in rows][::-1]
    for policy, colour in colours.items():
        widths = [row["documents"] if row["policy"] == policy else 0 for row in rows][::-1]
        bars = axes.barh(kinds, widths, color=colour, label=policy)
        axes.bar_label(bars, labels=[f"{n:,}" if n else "" for n in widths], padding=3)
    axes.set_xlabel("documents that hold it")
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.12)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return figure_png(figure)


def languages_picture(accepted: list[Row]) -> bytes:
    """Share of each language in the prose of each source."""
    prose = [row for row in accepted if row["format"] != "code" and row["language"]]
    total = Counter(row["language"] for row in prose)
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    told = names[:TOLD_APART]
    by_source: dict[str, Counter[str]] = {}
    for row in prose:
        language = row["language"] if row["language"] in told else "other"
        by_source.setdefault(row["source"], Counter())[language] += 1
    sources = sorted(by_source, reverse=True)
    figure = new_figure(9, 1.4 + 0.35 * max(1, len(sources)))
    axes = figure.subplots()
    begin = [0.0] * len(sources)
    for number, name in enumerate([*told, *(["other"] if len(names) > len(told) else [])]):
        shares = [by_source[key][name] / by_source[key].total() for key in sources]
        axes.barh(sources, shares, left=begin, color=COLOURS[number], label=name)
        begin = [a + b for a, b in zip(begin, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of documents")
    if sources:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
    else:
        axes.set_yticks([])
    return figure_png(figure)
