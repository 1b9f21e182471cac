"""Pictures of a verdict, one for each family, and the history of its looks.

In: checks. Out: PNG bytes. A value is a dot with its one-sided bounds, what it has to keep to is a
vermilion line; green passed, vermilion failed, orange is undecided, grey is invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from contracts.records import Check, Word
from resources import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = report.COLOURS
COLOUR: dict[Word, str] = {
    "PASS": GREEN,
    "FAIL": VERMILION,
    "UNDECIDED": ORANGE,
    "INVALID": GREY,
}


def comparisons(checks: Sequence[Check]) -> bytes | None:
    """Forest plot: each paired comparison, with zero and the margin."""
    rows = [check for check in checks if check.kind == "paired"]
    return _forest(
        rows,
        [f"{check.name}, against {check.against}" for check in rows],
        "mean difference, candidate minus the other (right is better)",
        zero=True,
    )


def floors(checks: Sequence[Check]) -> bytes | None:
    """Each mean with its 95 % interval and its floor."""
    rows = [check for check in checks if check.kind == "floor"]
    return _forest(rows, [check.name for check in rows], "mean", span=(0, 1))


def safety(checks: Sequence[Check]) -> bytes | None:
    """Each suite: the share withstood, what it shows at the least, the floor."""
    rows = [check for check in checks if check.family == "safety" and check.value is not None]
    labels = [f"{check.name} ({check.n} prompts)" for check in rows]
    return _forest(rows, labels, "share withstood, and its lower bound", span=(0, 1.02))


def _forest(
    rows: Sequence[Check],
    labels: Sequence[str],
    title: str,
    *,
    zero: bool = False,
    span: tuple[float, float] | None = None,
) -> bytes | None:
    """One line a check; None without any."""
    drawn = [
        (check, label) for check, label in zip(rows, labels, strict=True) if check.value is not None
    ]
    if not drawn:
        return None
    figure = report.new_figure(8, 1.0 + 0.42 * len(drawn))
    axes = figure.subplots()
    if zero:
        axes.axvline(0, color=GREY, linewidth=0.8)
    for at, (check, _) in enumerate(drawn):
        _interval(axes, at, check.value, check.low, check.high, COLOUR[check.outcome])
        if check.bound is not None:
            axes.plot([check.bound] * 2, [at - 0.32, at + 0.32], color=VERMILION, linewidth=2)
    axes.set_yticks(range(len(drawn)), [label for _, label in drawn])
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    if span:
        axes.set_xlim(*span)
    axes.set_xlabel(title)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, [check.outcome for check, _ in drawn], "margin" if zero else "floor")
    return report.figure_png(figure)


def _interval(
    axes: Axes, at: float, value: float | None, low: float | None, high: float | None, colour: str
) -> None:
    if low is not None and high is not None:
        axes.plot([low, high], [at, at], color=colour, linewidth=2)
        axes.plot([low, high], [at, at], "|", color=colour, markersize=8)
    if value is not None:
        axes.plot(value, at, "o", color=colour, markersize=6)


def _legend(axes: Axes, words: Sequence[Word], bound: str) -> None:
    """Beside the picture, so that it hides nothing."""
    for word in COLOUR:
        if word in words:
            axes.plot([], [], "o-", color=COLOUR[word], label=word)
    axes.plot([], [], color=VERMILION, linewidth=2, label=bound)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def looks(history: Sequence[dict[str, Any]]) -> bytes | None:
    """Bounds of each comparison at every look; None where one look was enough."""
    if len(history) < 2:
        return None
    names = list(
        dict.fromkeys((row["name"], row["against"]) for look in history for row in look["checks"])
    )
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = report.new_figure(2.9 * columns, 0.4 + 2.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for place, name in enumerate(names):
        axes = grid[place // columns][place % columns]
        axes.axhline(0, color=GREY, linewidth=0.8)
        for look in history:
            for row in look["checks"]:
                if (row["name"], row["against"]) == name:
                    axes.plot([look["questions"]] * 2, [row["low"], row["high"]],
                              color=COLOUR[row["outcome"]], linewidth=2)  # fmt: skip
                    axes.plot(look["questions"], row["value"], "o", color=COLOUR[row["outcome"]])
                    axes.axhline(row["bound"], color=VERMILION, linewidth=1.2)
        axes.set_title(f"{name[0]}, {name[1]}", fontsize=8)
        axes.tick_params(labelsize=8)
    for place in range(len(names), lines * columns):
        grid[place // columns][place % columns].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("questions", fontsize=8)
    return report.figure_png(figure)


def slices(checks: Sequence[Check]) -> bytes | None:
    """Each declared slice: how far every group is below the rest, and the gap allowed."""
    rows = [check for check in checks if check.family == "fairness" and check.evidence]
    if not rows:
        return None
    counts = [len(check.evidence["groups"]) for check in rows]
    figure = report.new_figure(8, 0.8 * len(rows) + 0.34 * sum(counts))
    grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=counts)
    for axes, check in zip(grid[:, 0], rows, strict=True):
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.axvline(check.bound, color=VERMILION, linewidth=2)
        groups = sorted(check.evidence["groups"], key=lambda row: -row["gap"])
        for at, row in enumerate(groups):
            over = row["low"] > (check.bound or 0)
            colour = VERMILION if over else BLUE
            _interval(axes, at, row["gap"], row["low"], row["high"], colour)
        axes.set_yticks(range(len(groups)), [f"{row['group']} ({row['n']})" for row in groups],
                        fontsize=8)  # fmt: skip
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_title(f"by {check.name}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    grid[-1, 0].set_xlabel("mean of the rest minus mean of the group (vermilion: the gap allowed)")
    return report.figure_png(figure)


def measured(checks: Sequence[Check], family: str) -> bytes | None:
    """Each figure as a share of its bound: left of the line it keeps to it."""
    rows = [
        check
        for check in checks
        if check.family == family and check.value and check.bound and check.outcome != "INVALID"
    ]
    if not rows:
        return None
    figure = report.new_figure(8, 1.0 + 0.36 * len(rows))
    axes = figure.subplots()
    for at, check in enumerate(rows):
        value, bound = float(check.value or 0), float(check.bound or 1)
        inverse = "at least" in check.detail
        share = bound / value if inverse else value / bound
        axes.barh(at, share, 0.6, color=COLOUR[check.outcome])
        label = f" {value:,.4g}"
        axes.text(share, at, label, va="center", fontsize=8)
    axes.axvline(1.0, color=VERMILION, linewidth=2)
    axes.set_yticks(
        range(len(rows)), [f"{check.name} ({_wanted(check)})" for check in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(1.25, 1.2 * max(bar.get_width() for bar in axes.patches)))  # type: ignore[attr-defined]
    axes.set_xlabel("share of what is allowed (1: the bound)")
    axes.spines[["top", "right"]].set_visible(False)
    return report.figure_png(figure)


def _wanted(check: Check) -> str:
    word = "at least" if "at least" in check.detail else "at most"
    return f"{word} {check.bound:,.6g}"
