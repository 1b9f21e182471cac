"""What the gate shows to people: its verdict as a page and a picture.

In: a verdict and the card it was given over. Out: ``gate.png``, ``report.html`` and, last,
``verdict.json``. The same verdict gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.records import Verdict
from stages import harness

if TYPE_CHECKING:
    from stages.gate import Card


def write(verdict: Verdict, card: Card, stable: Mapping[str, Any] | None, out: Path) -> None:
    """``gate.png``, ``report.html`` and, last, ``verdict.json`` below ``out``."""
    from resources import report

    harness.fresh_dir(out)
    png = picture(verdict, card)
    (out / "gate.png").write_bytes(png)
    good = {"PASS": True, "FAIL": False, "INVALID": None}[verdict.verdict]
    columns = ["name", "kind", "value", "bound", "passed", "low", "high", "n", "clusters"]
    with_what = (
        f"release {stable['release']}"
        if stable
        else "no other stable release, so floors and base only"
    )
    page = report.html_report(
        "Gate",
        [
            report.section("Reasons", *map(report.paragraph, verdict.reasons)),
            report.section(
                "Scores",
                report.image(png, "every metric of the policy with its interval and its floor"),
            ),
            report.section(
                "Checks", report.table(verdict.checks, columns), f"Compared with: {with_what}."
            ),
            *(
                report.section(
                    f"Questions that moved most: {title}",
                    report.table(rows, ["metric", "difference", "id", "question"]),
                )
                for title, rows in moved(verdict, card, stable)
            ),
            report.section(
                "Policy", report.preformatted(json.dumps(verdict.policy, indent=2, sort_keys=True))
            ),
        ],
        summary=report.badge(verdict.verdict, good),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    harness.write_json(out / "verdict.json", verdict.model_dump())


def moved(
    verdict: Verdict, card: Card, stable: Mapping[str, Any] | None, count: int = 5
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Worst and best questions against the stable release, or against base where there is none."""
    rows = []
    for metric in verdict.policy["paired"]:
        mine = {name: s.value for name, s in card.scores.get(("candidate", metric), {}).items()}
        if stable is not None:
            theirs = {name: values.get(metric) for name, values in stable["scores"].items()}
        else:
            theirs = {name: s.value for name, s in card.scores.get(("base", metric), {}).items()}
        for name, value in mine.items():
            other = theirs.get(name)
            if (
                value is not None
                and other is not None
                and value != other
                and name in card.questions
            ):
                rows.append(
                    {
                        "metric": metric,
                        "difference": round(value - other, 4),
                        "id": name,
                        "question": card.questions[name]["question"],
                    }
                )
    rows.sort(key=lambda row: (row["difference"], row["id"], row["metric"]))
    against = "stable" if stable is not None else "base"
    yield f"worst against {against}", [row for row in rows if row["difference"] < 0][:count]
    yield f"best against {against}", [row for row in rows[::-1] if row["difference"] > 0][:count]


def picture(verdict: Verdict, card: Card) -> bytes:
    """PNG: each metric of the policy, candidate and base with 95 % intervals, and the floors."""
    from resources import report

    floors = {floor["metric"]: floor["min"] for floor in verdict.policy["floors"]}
    metrics: Sequence[str] = list(dict.fromkeys([*floors, *verdict.policy["paired"]]))
    figure = report.new_figure(7, 0.9 + 0.55 * len(metrics))
    axes = figure.subplots()
    for offset, colour, system in (
        (-0.13, report.COLOURS[0], "candidate"),
        (0.13, report.COLOURS[5], "base"),
    ):
        for position, metric in enumerate(metrics):
            found = card.systems.get(system, {}).get(metric)
            if not found or found["mean"] is None:
                continue
            axes.plot(
                [found["low"], found["high"]], [position + offset] * 2, color=colour, linewidth=2
            )
            axes.plot(found["mean"], position + offset, "o", color=colour)
        axes.plot([], [], "o-", color=colour, label=system)
    for position, metric in enumerate(metrics):
        if metric in floors:
            axes.plot(
                [floors[metric]] * 2,
                [position - 0.35, position + 0.35],
                color=report.COLOURS[3],
                linewidth=2,
            )
    axes.plot([], [], color=report.COLOURS[3], label="floor")
    axes.set_yticks(range(len(metrics)), metrics)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("mean and 95 % interval")
    axes.set_title(f"Gate: {verdict.verdict}")
    axes.legend(loc="best", fontsize=8)
    return report.figure_png(figure)
