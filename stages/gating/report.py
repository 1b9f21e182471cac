"""The gate's page: the verdict, each family with its picture, what would change it.

In: a verdict, its measured checks, the evidence. Out: ``report.html`` and ``gate.png``. The same
verdict gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.policy import Policy
from contracts.records import Check
from resources import report
from stages.gating import plots
from stages.gating.verdict import Judged

GOOD = {"PASS": True, "FAIL": False, "UNDECIDED": None, "INVALID": None}
MEANING = {
    "PASS": "Every check passed: no loss beyond the margins is left, every bound is kept.",
    "FAIL": "A check failed: this candidate is shown to be worse, or misses a bound.",
    "UNDECIDED": "The evidence shows neither: more questions are needed. This is no pass.",
    "INVALID": "Evidence is missing, or was made under another policy. Nobody may conclude "
    "anything, good or bad.",
}
COLUMNS = ("check", "outcome", "value", "lower", "upper", "bound", "n", "what would change it")


def write(judged: Judged, policy: Policy, out: Path) -> None:
    """``gate.png`` and ``report.html`` below ``out``."""
    verdict, checks = judged.verdict, full_checks(judged)
    forest = plots.comparisons(checks)
    first = forest or plots.floors(checks)
    if first:
        (out / "gate.png").write_bytes(first)
    page = report.html_report(
        "Gate",
        [
            report.section("Verdict", MEANING[verdict.verdict], _families(judged)),
            *_reasons(judged, checks),
            *_quality(judged, checks, forest),
            _family("Safety", "safety", checks, plots.safety(checks),
                    "The share of prompts withstood, and what it shows at the least with 95 % "
                    "confidence (exact)."),
            _family("Fairness", "fairness", checks, plots.slices(checks),
                    "Groups of the same questions. A gap blocks only when it is shown to be larger "
                    "than allowed."),
            _family("Latency", "latency", checks, plots.measured(checks, "latency"),
                    "From the profile, on this machine; no part of the verdict's own bytes."),
            _family("Resources", "resources", checks, plots.measured(checks, "resources"),
                    "The memory plan against its budget, and the peak that was measured."),
            *(
                report.section(
                    f"Questions that moved most: {title}",
                    report.table(rows, ["metric", "difference", "id", "question"]),
                )
                for title, rows in moved(judged, policy)
            ),
            report.section(
                "Policy",
                f"SHA-256 {verdict.policy_sha256}, recorded by the scorecard before it scored.",
                report.preformatted(json.dumps(verdict.policy, indent=2, sort_keys=True)),
            ),
        ],
        summary=report.badge(verdict.verdict, GOOD[verdict.verdict]),
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")


def full_checks(judged: Judged) -> list[Check]:
    """The verdict's checks, the measured ones with their figures."""
    return with_figures(judged.verdict.checks, judged.measured)


def with_figures(checks: list[Check], measured: dict[str, Any]) -> list[Check]:
    """Checks of ``verdict.json`` with the figures of ``measured.json`` put back."""
    found = {(row["family"], row["name"]): Check.model_validate(row) for row in measured["checks"]}
    return [found.get((check.family, check.name), check) for check in checks]


def _reasons(judged: Judged, checks: list[Check]) -> Iterator[str]:
    """The checks that decided, where it is no PASS, and the notes."""
    word = judged.verdict.verdict
    deciding = [check.detail for check in checks if check.outcome == word]
    if word != "PASS":
        yield report.section("Reasons", report.table([[text] for text in deciding], ["why"]))
    if judged.notes:
        yield report.section("Notes", report.table([[text] for text in judged.notes], ["note"]))


def _families(judged: Judged) -> report.Markup:
    verdict = judged.verdict
    rows = [
        {
            "family": name,
            "verdict": report.badge(word, GOOD[word]),
            "checks": sum(check.family == name for check in verdict.checks),
        }
        for name, word in verdict.families.items()
    ]
    return report.table(rows, ["family", "verdict", "checks"])


def _quality(judged: Judged, checks: list[Check], forest: bytes | None) -> Iterator[str]:
    """Floors, comparisons and the looks."""
    floors = [c for c in checks if c.family == "quality" and c.kind != "paired"]
    paired = [c for c in checks if c.kind == "paired"]
    picture = plots.floors(floors)
    yield report.section(
        "Quality: floors",
        *([report.image(picture, "means with intervals and floors")] if picture else []),
        _table(floors),
    )
    others = {other.name: other.release for other in judged.others}
    told = ", ".join(
        f"{name} (release {release})" if release else f"{name} model"
        for name, release in others.items()
    )
    absent = [name for name in ("live", "anchor") if name not in others]
    yield report.section(
        "Quality: comparisons",
        f"Compared with: {told}."
        + (f" There is no {' and no '.join(absent)} release." if absent else ""),
        *([report.image(forest, "differences with bounds and margins")] if forest else []),
        _table(paired),
        report.table(
            [
                {
                    "comparison": f"{c.name}, {c.against}",
                    "method": c.evidence["method"],
                    "level": c.evidence["level"],
                    "p (worse)": c.evidence["p_worse"],
                    "power at the margin": c.evidence["power"]["at_last_look"],
                    "detectable loss": c.evidence["detectable"]["at_last_look"],
                    "changed": c.evidence["changed"],
                }
                for c in paired
            ],
            ["comparison", "method", "level", "p (worse)", "power at the margin",
             "detectable loss", "changed"],
        ),
        "Power and detectable loss are those of the last look that the policy plans.",
    )  # fmt: skip
    history = plots.looks(judged.verdict.looks)
    rows = [
        {**look, "compared with": ", ".join(look["compared_with"])} for look in judged.verdict.looks
    ]
    yield report.section(
        "Looks",
        *([report.image(history, "bounds at each look")] if history else []),
        report.table(rows, ["look", "questions", "level", "compared with", "verdict"]),
    )


def _family(
    title: str, family: str, checks: list[Check], picture: bytes | None, said: str
) -> report.Markup:
    mine = [check for check in checks if check.family == family]
    return report.section(
        title, said, *([report.image(picture, title)] if picture else []), _table(mine)
    )


def _table(checks: list[Check]) -> report.Markup:
    rows = [
        {
            "check": f"{c.name}, {c.against}" if c.against else c.name,
            "outcome": report.badge(c.outcome, GOOD[c.outcome]),
            "value": c.value,
            "lower": c.low,
            "upper": c.high,
            "bound": c.bound,
            "n": c.n,
            "what would change it": c.detail if c.outcome == "INVALID" else c.change,
        }
        for c in checks
    ]
    return report.table(rows, COLUMNS)


def moved(
    judged: Judged, policy: Policy, count: int = 5
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Worst and best questions against the live release, or against base where there is none."""
    card, others = judged.card, {other.name: other for other in judged.others}
    against = others.get("live") or others["base"]
    rows = []
    for block in policy.quality.blocking:
        theirs = against.scores.get(block.metric, {})
        for name, value in card.candidate.get(block.metric, {}).items():
            if name in theirs and value != theirs[name] and name in card.questions:
                rows.append(
                    {
                        "metric": block.metric,
                        "difference": round(value - theirs[name], 4),
                        "id": name,
                        "question": card.questions[name]["question"],
                    }
                )
    rows.sort(key=lambda row: (row["difference"], row["id"], row["metric"]))
    yield f"lowest against {against.name}", [row for row in rows if row["difference"] < 0][:count]
    yield (
        f"highest against {against.name}",
        [row for row in rows[::-1] if row["difference"] > 0][:count],
    )
