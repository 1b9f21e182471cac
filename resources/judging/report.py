"""How judges compare with people, as one HTML page with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources import report
from resources.judging.agreement import Interval
from resources.judging.calibration import NO_VERDICT, Calibration, uncalibrated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["judge", "form", "labels", "kappa", "right", "orders agree", "no verdict", "may decide"]


def write_report(found: Sequence[Calibration], out: Path, *, floor: float) -> Path:
    """Write ``<out>/report.html`` and return its path. ``floor``: of kappa, by the policy."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page(found, floor), encoding="utf-8")
    return path


def page(found: Sequence[Calibration], floor: float) -> str:
    """The page of these calibrations, best judge first."""
    ordered = sorted(found, key=lambda item: (-item.kappa.low, item.model, item.form))
    if not ordered:
        return report.html_report("Judges", [], "No judge has been calibrated.")
    usable = sum(uncalibrated(item, floor) is None for item in ordered)
    parts = [
        report.section(
            "Agreement with people",
            report.image(report.figure_png(picture(ordered, floor)), words_of(ordered, floor)),
            "Kappa is agreement beyond chance: 1 is people's verdict every time, 0 is guessing, "
            "below 0 the opposite. A judge may decide something only when the lower end of its "
            f"interval reaches {floor:g}. No verdict counts as disagreement.",
            report.table([row(item, floor) for item in ordered], COLUMNS),
        ),
        *(confusion(item) for item in ordered),
    ]
    return report.html_report(
        "Judges", parts, report.badge(f"{usable} of {len(ordered)} may decide", usable > 0)
    )


def row(item: Calibration, floor: float) -> dict[str, object]:
    """One judge of the table."""
    doubt = uncalibrated(item, floor)
    return {
        "judge": f"{item.model} {item.version}",
        "form": item.form,
        "labels": item.n,
        "kappa": said(item.kappa),
        "right": said(item.right),
        "orders agree": said(item.same) if item.same else "asked once",
        "no verdict": sum(item.invalid.values()),
        "may decide": report.badge("yes" if doubt is None else "no", doubt is None),
    }


def said(value: Interval) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def words_of(found: Sequence[Calibration], floor: float) -> str:
    parts = [f"{item.model} {item.form}: kappa {said(item.kappa)}" for item in found]
    return f"Kappa with 95 % intervals, floor {floor:g}. " + "; ".join(parts)


def picture(found: Sequence[Calibration], floor: float) -> Figure:
    """Left kappa with its interval and the floor, right what became of the labels."""
    figure = report.new_figure(9.5, 1.6 + 0.42 * len(found))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.1, 1])
    blue, orange, green, vermilion, _, grey = report.COLOURS
    places = list(range(len(found)))[::-1]
    for place, item in zip(places, found, strict=True):
        good = uncalibrated(item, floor) is None
        left.plot([item.kappa.low, item.kappa.high], [place, place], color=grey, lw=2)
        left.plot(item.kappa.value, place, "o" if good else "X", color=blue if good else vermilion)
    left.axvline(floor, color=orange, ls="--", lw=1.2)
    left.axvline(0, color=grey, lw=0.8)
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.set(xlim=(-1, 1), xlabel=f"kappa (dashed: floor {floor:g}; cross: may not decide)")
    left.set_yticks(
        places, [f"{item.model}\n{item.form}, n={item.n}" for item in found], fontsize=8
    )
    begin = [0.0] * len(found)
    kinds = {"right": green, "orders disagree": orange, "wrong": vermilion, "no verdict": grey}
    for kind, colour in kinds.items():
        shares = [outcomes(item)[kind] for item in found]
        right.barh(places, shares, left=begin, color=colour, label=kind, height=0.6)
        begin = [a + b for a, b in zip(begin, shares, strict=True)]
    right.set(xlim=(0, 1), xlabel="share of the labels")
    right.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def outcomes(item: Calibration) -> Mapping[str, float]:
    """Shares of the labels by what became of them; they add up to 1."""
    invalid = sum(item.invalid.values()) / item.n
    silent = sum(of_it.get(NO_VERDICT, 0) for of_it in item.confusion.values()) / item.n
    shares = {"right": item.right.value, "orders disagree": silent - invalid, "no verdict": invalid}
    return shares | {"wrong": max(0.0, 1 - sum(shares.values()))}


def confusion(item: Calibration) -> report.Markup:
    """People's labels against the judge's."""
    columns = sorted({name for of_it in item.confusion.values() for name in of_it})
    rows = [
        {"people say": name, **{column: of_it.get(column, 0) for column in columns}}
        for name, of_it in sorted(item.confusion.items())
    ]
    kinds = ", ".join(f"{count} {kind}" for kind, count in item.invalid.items())
    return report.section(
        f"{item.model}: {item.form}",
        f"Version {item.version}, answered by {', '.join(item.served) or 'nobody'}; "
        f"labels {item.labels[:12]}. Calls that failed: {kinds or 'none'}.",
        report.table(rows, ["people say", *columns]),
    )
