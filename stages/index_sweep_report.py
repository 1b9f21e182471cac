"""The page and the picture of the stage index_sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from stages.index_sweep import Point, Sweep


def picture(sweep: Sweep) -> bytes:
    """Recall against latency, one line a graph, ef along it; a larger dot is a larger graph."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    graphs = list(dict.fromkeys((point.hnsw_m, point.ef_construct) for point in sweep.points))
    widths = sorted({m for m, _ in graphs if m is not None})
    sizes = sorted({point.graph_bytes for point in sweep.points})
    span = max(sizes[-1] - sizes[0], 1)
    for m, construct in graphs:
        line = sorted(
            (p for p in sweep.points if (p.hnsw_m, p.ef_construct) == (m, construct)),
            key=lambda point: point.ef or 0,
        )
        colour = COLOURS[widths.index(m or 0) % len(COLOURS)]
        rank = sorted({c for w, c in graphs if w == m and c}).index(construct or 0)
        axes.plot(
            [p.p50_ms for p in line], [p.recall for p in line], ("--", "-", ":")[rank % 3],
            color=colour, linewidth=1.2,
            label=f"m {m}, ef_construct {construct}: {line[0].graph_bytes / 1e6:.2f} MB",
        )  # fmt: skip
        area = 15 + 85 * (line[0].graph_bytes - sizes[0]) / span
        axes.scatter([p.p50_ms for p in line], [p.recall for p in line], area, color=colour)
    exact = sweep.exact
    axes.scatter([exact.p50_ms], [exact.recall], 90, color=COLOURS[5], marker="s", label="exact")
    for point, text in ((sweep.own, "set"), (sweep.chosen, "chosen")):
        if point is not None:
            axes.annotate(
                f"{text}: ef {point.ef}", (point.p50_ms, point.recall), (0, -26 if text == "set"
                else 14), textcoords="offset points", ha="center", fontsize=8,
                arrowprops={"arrowstyle": "-", "linewidth": 0.7},
            )  # fmt: skip
    axes.axhline(sweep.min_recall, color=COLOURS[3], linewidth=1, linestyle=":", label="the floor")
    axes.set(xlabel="median latency of a search, ms", ylabel="recall@10 against exact search")
    axes.margins(y=0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure_png(figure)


def page(sweep: Sweep, png: bytes) -> str:
    """The HTML page."""
    own, chosen = sweep.own, sweep.chosen
    rows = [_row(point, sweep) for point in (sweep.exact, *sweep.points)]
    names = [
        "m",
        "ef_construct",
        "ef",
        "role",
        "recall@10",
        "p50 ms",
        "p95 ms",
        "graph MB",
        "build s",
    ]
    said = (
        f"The graph of params.yaml (m {own.hnsw_m}, ef_construct {own.ef_construct}, ef {own.ef}) "
        f"finds {own.recall:.4f} of the true ten in {own.p50_ms:.2f} ms; exact search takes "
        f"{sweep.exact.p50_ms:.2f} ms at {sweep.vectors:,} chunks. "
    )
    said += (
        f"The floor of {sweep.min_recall} is reached most cheaply by m {chosen.hnsw_m}, "
        f"ef_construct {chosen.ef_construct}, ef {chosen.ef}."
        if chosen
        else f"No point reaches the floor of {sweep.min_recall}."
    )
    verdict = "reaches" if own.recall >= sweep.min_recall else "misses"
    return html_report(
        "HNSW against exact search",
        [
            section(
                "Recall, latency, memory",
                badge(f"What is set {verdict} the floor.", verdict == "reaches"),
                said,
                image(png, "recall at ten against median latency, by graph"),
                table(rows, names),
            ),
            section(
                "How to read this",
                f"{sweep.queries} queries half-way between two chunks; each was searched once, in "
                "this process, payload included. Timings are of this machine and this run.",
                f"Beside the graph a search maps the vectors themselves, "
                f"{sweep.vector_bytes / 1e6:.1f} MB here. An index of up to index.exact_below "
                "chunks is searched exactly and holds no graph.",
            ),
        ],
        f"{sweep.vectors:,} chunks of {sweep.dimension} dimensions.",
    )


def _row(point: Point, sweep: Sweep) -> list[object]:
    roles = ["set"] * point.own + ["chosen"] * (point == sweep.chosen)
    shape = (
        [point.hnsw_m, point.ef_construct, point.ef] if point.hnsw_m else ["exact search", "", ""]
    )
    sizes = [point.graph_bytes / 1e6, point.build_seconds] if point.hnsw_m else ["", ""]
    return [*shape, ", ".join(roles), point.recall, point.p50_ms, point.p95_ms, *sizes]
