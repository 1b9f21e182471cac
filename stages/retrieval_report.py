"""The page and the pictures of the stage retrieval.

In: its findings. Out: PNGs by name, one self-contained HTML page. Test questions are only counted:
the page names none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resources.report import (
    COLOURS,
    Markup,
    badge,
    figure_png,
    html_report,
    image,
    new_figure,
    preformatted,
    section,
    table,
)
from stages.retrieval_choice import DENSE, METRIC
from stages.retrieval_metrics import Interval, Result, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stages.retrieval import Findings

#: Beside this page when the stage index_sweep has run.
SWEEP = Markup(
    '<p><a href="../index_sweep/report.html">HNSW against exact search on these vectors</a> '
    "(stage index_sweep).</p>"
)

#: Colours of dense, sparse and fused search.
ARM_COLOURS = (COLOURS[0], COLOURS[1], COLOURS[2])


def pictures(found: Findings) -> dict[str, bytes]:
    """PNGs: recall over k, nDCG by class of question, similarity of the best chunk."""
    return {
        "retrieval": _recall_picture(found),
        "classes": _class_picture(found),
        "similarity": _similarity_picture(found),
    }


def _recall_picture(found: Findings) -> bytes:
    """Recall over k of each way of searching, dev and test side by side."""
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    top_k = found.top_k
    for axes, split in zip(panels, ("dev", "test"), strict=True):
        for at, name in enumerate(found.shown):
            summary = found.summaries[split][name]
            if not summary.questions:
                continue
            names = [f"recall_at_{k}" for k in top_k]
            means = [summary.metrics[key] for key in names]
            # Side by side: intervals that lie upon each other cannot be told apart.
            places = [k * 1.035 ** (at - 1) for k in top_k]
            bars = _reach(means, [summary.intervals[key] for key in names])
            axes.errorbar(
                places, means, bars, fmt="o-", color=ARM_COLOURS[at], label=name,
                markersize=4, linewidth=1.4, elinewidth=1, capsize=2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(list(top_k), [str(k) for k in top_k])
        axes.minorticks_off()
        count = found.summaries[split][DENSE]
        axes.set_title(
            f"{split}: {count.questions} questions, {count.documents} documents", fontsize=10
        )
        axes.set(xlabel="first k chunks", ylim=(0, 1.02))
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    panels[0].set_ylabel("share with a right chunk among them")
    panels[0].legend(loc="lower right")
    return figure_png(figure)


def _class_picture(found: Findings) -> bytes:
    """nDCG@10 by class of question on dev, one bar a way of searching."""
    by_arm = found.parts["class"]["dev"]
    parts = {name: by_arm[name] for name in found.shown}
    classes = list(parts[DENSE])
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(parts)
    for at, (name, by_class) in enumerate(parts.items()):
        means = [by_class[kind].metrics[METRIC] for kind in classes]
        places = [spot + (at - (len(parts) - 1) / 2) * width for spot in range(len(classes))]
        axes.bar(places, means, width * 0.92, color=ARM_COLOURS[at], label=name)
        _whiskers(axes, places, means, [by_class[kind].intervals[METRIC] for kind in classes])
    labels = [f"{kind}\n({parts[DENSE][kind].questions})" for kind in classes]
    axes.set_xticks(range(len(classes)), labels, fontsize=8.5)
    axes.set(ylabel="nDCG@10 on dev", ylim=(0, 1.02))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure_png(figure)


def _whiskers(
    axes: Axes, places: Sequence[float], means: Sequence[float], intervals: Sequence[Interval]
) -> None:
    axes.errorbar(
        places, means, _reach(means, intervals), fmt="none", ecolor="#1f2933", elinewidth=0.9,
        capsize=1.5,
    )  # fmt: skip


def _reach(means: Sequence[float], intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths below and above each mean; none where there is no interval."""
    pairs = [pair or (mean, mean) for mean, pair in zip(means, intervals, strict=True)]
    return [
        [max(0.0, mean - low) for mean, (low, _) in zip(means, pairs, strict=True)],
        [max(0.0, high - mean) for mean, (_, high) in zip(means, pairs, strict=True)],
    ]


def _similarity_picture(found: Findings) -> bytes:
    """The cosine of the first chunk, for questions with and without an answer."""
    figure = new_figure(7, 3)
    axes = figure.subplots()
    edges = [number / 20 for number in range(21)]
    for answerable, label, colour in (
        (True, "answerable", COLOURS[0]),
        (False, "not answerable", COLOURS[3]),
    ):
        best = [
            result.hits[0].score
            for result in found.own
            if result.question.answerable is answerable and result.hits
        ]
        axes.hist(best, bins=edges, color=colour, alpha=0.6, label=f"{label} ({len(best)})")
    axes.set(xlabel="cosine of the first chunk", ylabel="dev questions")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure_png(figure)


def page(found: Findings, drawn: Mapping[str, bytes], verdict: str) -> str:
    """The HTML page."""
    own = found.choice.own
    dev, test = (found.summaries[split][own] for split in ("dev", "test"))
    unanswerable = sum(not item.question.answerable for item in found.own)
    certified = ", ".join(f"{name} {value:.4f}" for name, value in found.certified.items())
    return html_report(
        "Retrieval on the golden questions",
        [
            section(
                "Dense, sparse or fused",
                _badge(found),
                verdict,
                image(drawn["retrieval"], "recall over k by way of searching, on dev and on test"),
                table(_arm_rows(found), _arm_columns(found)),
                "Differences are mean paired differences in nDCG@10 to dense search. On dev their "
                "95 % intervals hold for all rows at once, because the best of many rows looks "
                "good by chance; test judges a single one.",
            ),
            section(
                f"As the index is set: {own}",
                table(_metric_rows(found, dev, test), _METRIC_COLUMNS),
                "Intervals are 95 % percentile bootstraps that draw documents, because questions "
                f"about one page stand or fall together; {dev.documents} documents on dev and "
                f"{test.documents} on test are few, so the intervals are rather too narrow. An "
                "interval of no width says that all documents agree, not that it is certain.",
                f"The index against exact search: {certified}.",
                SWEEP,
            ),
            section(
                "By source",
                table(_part_rows(found, "source"), _part_columns(found, "source")),
            ),
            section(
                "By class of question",
                image(drawn["classes"], "nDCG@10 by class of question and way of searching"),
                table(_part_rows(found, "class"), _part_columns(found, "class")),
                "The classes are rules over the words of the question: stages/query_class.py.",
            ),
            section(
                "How alike the first chunk is",
                image(drawn["similarity"], "cosine of the first chunk by kind of question"),
            ),
            section(
                "Missed dev questions",
                f"{len(found.missed)} questions had no chunk of their section among the first "
                f"{len(found.own[0].hits)}.",
                *(_miss(found, result) for result in found.missed),
            ),
            section("Dev questions whose answer was not found whole", *_partial(found)),
        ],
        f"{dev.questions} answerable dev questions and {unanswerable} that are not; "
        f"{test.questions} answerable test questions. Index {found.content[:16]}.",
    )


def _badge(found: Findings) -> Markup:
    choice = found.choice
    if choice.agrees:
        return badge(f"The index searches as dev chooses: {choice.chosen}.", True)
    return badge(f"Warning: dev chooses {choice.chosen}, the index searches {choice.own}.", None)


def _arm_columns(found: Findings) -> list[str]:
    recall = found.headline.replace("_at_", "@")
    dev = ["dev nDCG@10", "to dense, 95 % for all at once", f"dev {recall}"]
    return ["search", *dev, "test nDCG@10", f"test {recall}"]


def _arm_rows(found: Findings) -> list[list[Any]]:
    choice, rows = found.choice, []
    for name, dev in found.summaries["dev"].items():
        test = found.summaries["test"][name]
        roles = ["chosen"] * (name == choice.chosen) + ["set"] * (name == choice.own)
        rows.append(
            [
                name.replace(" ", "\u00a0") + (f" ({', '.join(roles)})" if roles else ""),
                dev.metrics[METRIC],
                str(choice.dev.get(name, "")),
                dev.metrics[found.headline],
                test.metrics.get(METRIC, ""),
                test.metrics.get(found.headline, ""),
            ]
        )
    return rows


_METRIC_COLUMNS = ["metric", "dev", "95 %", "floor", "test", "95 %"]


def _metric_rows(found: Findings, dev: Summary, test: Summary) -> list[list[Any]]:
    floor = {found.headline: found.floor}
    return [
        [name, *_figure(dev, name), floor.get(name, ""), *_figure(test, name)]
        for name in dev.metrics
    ]


def _part_columns(found: Findings, kind: str) -> list[str]:
    last = found.top_k[-1]
    counts = [kind, "split", "questions", "documents"]
    return [*counts, "nDCG@10", "95 %", f"recall@{last}", "95 %", f"answer@{last}"]


def _part_rows(found: Findings, kind: str) -> list[list[Any]]:
    """A row a part and split, under the index's own search."""
    by_split = {split: arms[found.choice.own] for split, arms in found.parts[kind].items()}
    last = found.top_k[-1]
    return [
        [
            name, split, summary.questions, summary.documents, *_figure(summary, METRIC),
            *_figure(summary, found.headline), summary.metrics[f"answer_at_{last}"],
        ]
        for name in dict.fromkeys(name for parts in by_split.values() for name in parts)
        for split, parts in by_split.items()
        if (summary := parts.get(name))
    ]  # fmt: skip


def _figure(summary: Summary, name: str) -> tuple[Any, str]:
    """A mean and its interval as two cells."""
    if name not in summary.metrics:
        return "", ""
    return summary.metrics[name], _span(summary.intervals[name])


def _span(pair: Interval) -> str:
    return "\u00a0to\u00a0".join(f"{value:.3f}" for value in pair) if pair else "one document"


def _miss(found: Findings, result: Result) -> str:
    """One missed question: what was wanted, what came instead, and who would have found it."""
    item = result.question
    lines = [f"{item.id}: {item.question}", f"wanted   {_place(item.document, item.section)}"]
    if item.answer:
        lines.append(f"answer   {item.answer}")
    lines += [
        f"{hit.score:8.3f} {_place(f'{hit.chunk.source}:{hit.chunk.path}', hit.chunk.heading)}"
        for hit in result.hits[:3]
    ]
    at = found.own.index(result)
    ranks = {name: found.arms["dev"][name][at].rank for name in found.shown}
    by = [f"{name} at rank {rank}" for name, rank in ranks.items() if rank]
    lines.append(f"found by {', '.join(by) or 'no way of searching'}")
    return preformatted("\n".join(lines))


def _place(document: str | None, heading: str | None) -> str:
    return f"{document} > {heading}" if heading else str(document)


def _partial(found: Findings) -> list[str]:
    """Questions whose section was found, but not the answer: by rank of the section."""
    rows = [
        [item.question.id, item.question.question, item.rank, item.question.answer]
        for item in found.own
        if item.rank and not any(item.has_answer)
    ]
    if not rows:
        return ["Wherever the section was found, so was the answer."]
    said = (
        f"{len(rows)} questions had a chunk of their section among the hits and their answer in "
        "none of them: it stands in another chunk of that section, or is cut between two."
    )
    return [said, table(rows, ["id", "question", "rank of the section", "answer wanted"])]
