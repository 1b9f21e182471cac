"""`ratchet cache`: the threshold of the gateway's semantic cache, and answers to be forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The gateway's cache.", no_args_is_help=True)


@app.command()
def calibrate(
    pairs: Annotated[Path | None, typer.Option(help="CSV with a, b, same.")] = None,
    banking77: Annotated[
        Path | None, typer.Option(help="Folder with train.csv and test.csv (text, category).")
    ] = None,
    max_wrong: Annotated[float, typer.Option(help="Wrong share of all requests, at most.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Folder of curve.csv and report.html.")] = None,
) -> None:
    """Find the threshold with the most hits that is wrong rarely enough, by its upper bound."""
    given = {"--pairs": pairs, "--banking77": banking77, "--out": out}
    arguments = ["--max-wrong", str(max_wrong)]
    for name, path in given.items():
        if path is not None:
            arguments += [name, str(path.resolve())]
    _run("calibrate", *arguments)


@app.command()
def purge(
    release: Annotated[str | None, typer.Option(help="Answers of this release.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Answers to this tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Answers under this model's name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every answer.")] = False,
) -> None:
    """Forget cached answers, in every gateway and store. Several options together: what has all."""
    arguments = ["--all"] if everything else []
    for name, value in (("--release", release), ("--tenant", tenant), ("--model", model)):
        if value is not None:
            arguments.append(f"{name}={value}")
    _run("purge", *arguments)


def _run(module: str, *arguments: str) -> None:
    """The gateway's own command, as a process: pipelines do not import serving."""
    command = [sys.executable, "-m", f"serving.gateway.cache.{module}", *arguments]
    code = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
    if code:
        raise typer.Exit(code)
