"""The page and the picture of the stage retrieval.

In: results by question and their metrics. Out: one self-contained HTML page, one PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resources.report import (
    COLOURS,
    figure_png,
    html_report,
    image,
    new_figure,
    preformatted,
    section,
    table,
)

if TYPE_CHECKING:
    from stages.retrieval import Result


def picture(
    results: Sequence[Result],
    metrics: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    top_k: Sequence[int],
) -> bytes:
    """Left: recall over k with its interval. Right: the best similarity, by kind of question."""
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    for kind, label, colour in (
        ("recall", "a chunk of the right section", COLOURS[0]),
        ("answer", "the whole answer", COLOURS[1]),
    ):
        names = [f"{kind}_at_{k}" for k in top_k]
        left.plot(top_k, [metrics[name] for name in names], "o-", color=colour, label=label)
        low, high = zip(*(intervals[name] for name in names), strict=True)
        left.fill_between(top_k, low, high, color=colour, alpha=0.2, linewidth=0)
    left.set(xlabel="first k chunks", ylabel="share of questions", ylim=(0, 1.02))
    left.set_xticks(list(top_k))
    left.legend(loc="lower right", title="found among them, 95 % interval")
    edges = [number / 20 for number in range(21)]
    for answerable, label, colour in (
        (True, "answerable", COLOURS[0]),
        (False, "not answerable", COLOURS[3]),
    ):
        best = [
            result.hits[0].score
            for result in results
            if result.question.answerable is answerable and result.hits
        ]
        right.hist(best, bins=edges, color=colour, alpha=0.6, label=f"{label} ({len(best)})")
    right.set(xlabel="cosine of the best chunk", ylabel="questions")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure_png(figure)


def page(report: dict[str, Any], results: Sequence[Result], png: bytes) -> str:
    """The HTML page."""
    floor = report["floor"]
    rows = [
        [name, value, *report["intervals"].get(name, ("", "")), floor.get(name, "")]
        for name, value in report["metrics"].items()
    ]
    certified = report["against_exact_search"].items()
    exact = ", ".join(f"{name} {value:.4f}" for name, value in certified)
    missed = [result for result in results if result.question.id in report["missed"]]
    return html_report(
        "Retrieval on the golden dev questions",
        [
            section(
                "Metrics",
                image(png, "recall over k, and best similarity by kind of question"),
                table(rows, ["metric", "mean", "95 % from", "to", "floor"]),
                f"The index against exact search: {exact}.",
            ),
            section(
                "Missed questions",
                f"{len(missed)} questions had no chunk of their section among the hits.",
                *(_miss(result) for result in missed),
            ),
        ],
        f"{int(report['metrics']['questions'])} answerable questions, "
        f"{sum(not result.question.answerable for result in results)} that are not.",
    )


def _miss(result: Result) -> str:
    """One missed question: what was wanted, what came instead."""
    item = result.question
    lines = [f"{item.id}: {item.question}", f"wanted   {item.document} > {item.section}"]
    lines += [
        f"{hit.score:8.3f} {hit.chunk.source}:{hit.chunk.path} > {hit.chunk.heading}"
        for hit in result.hits[:3]
    ]
    return preformatted("\n".join(lines))
