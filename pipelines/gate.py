"""`ratchet gate`: what the gate said and what would change it; the frozen anchor."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from assets.gate_files import last_verdict, move_anchor
from contracts.records import Check
from contracts.settings import Settings

app = typer.Typer(help="The gate: explain its verdict, move its anchor.", no_args_is_help=True)


@app.command()
def explain(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """The last verdict: per check what was asked, what was found, what would change it."""
    found = last_verdict(Settings.from_env())
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else render(found))


@app.command()
def anchor(
    reason: Annotated[str, typer.Option(help="Why; it stands in the file.")],
) -> None:
    """Make the release in data/release.json the anchor that every later candidate is compared with.

    The live release moves with each deployment, so small losses that each pass could add up; the
    anchor moves only by this command. Commit data/anchor.json.
    """
    print(move_anchor(Settings.from_env(), reason))


def render(found: dict[str, Any]) -> str:
    """For a terminal: the verdict, then each family, what failed first."""
    order = {"INVALID": 0, "FAIL": 1, "UNDECIDED": 2, "PASS": 3}
    lines = [f"gate: {found['verdict']}"]
    if not found["current"]:
        lines.append("(of an earlier scorecard: dvc repro gate)")
    for family, word in found["families"].items():
        lines += ["", f"{family}: {word}"]
        checks = [Check.model_validate(row) for row in found["checks"] if row["family"] == family]
        for check in sorted(checks, key=lambda one: order[one.outcome]):
            lines.append(f"  {check.outcome:9} {check.detail}")
            if check.evidence.get("power"):
                power, loss = check.evidence["power"], check.evidence["detectable"]
                lines.append(
                    f"            power at the margin {power['now']:.2f} now, "
                    f"{power['at_last_look']:.2f} at the last look; "
                    f"detectable loss {loss['now']:.3f}, {loss['at_last_look']:.3f}"
                )
            if check.outcome != "PASS" and check.change:
                lines.append(f"            would change it: {check.change}")
    lines.append("")
    for look in found["looks"]:
        lines.append(
            f"look {look['look']}: {look['questions']} questions, one-sided level "
            f"{look['level']:.2g}, against {', '.join(look['compared_with'])}: {look['verdict']}"
        )
    lines += [reason for reason in found["reasons"] if reason.startswith("note")]
    return "\n".join([*lines, f"report: {found['report']}"])
