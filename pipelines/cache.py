"""`ratchet cache`: the threshold of the gateway's semantic cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from contracts.settings import Settings

app = typer.Typer(help="The gateway's cache.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """One command would otherwise lose its name."""


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
    command = [sys.executable, "-m", "serving.gateway.cache.calibrate"]
    command += ["--max-wrong", str(max_wrong)]
    for name, path in (("--pairs", pairs), ("--banking77", banking77), ("--out", out)):
        if path is not None:
            command += [name, str(path.resolve())]
    root = Settings.from_env().root
    code = subprocess.run(command, cwd=root, check=False).returncode
    if code:
        raise typer.Exit(code)
