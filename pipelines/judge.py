"""`ratchet judge`: what the judge model of params.yaml is worth, measured against people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contracts.errors import ConfigError, ServiceError
from contracts.params import Judge, load_params
from contracts.settings import Settings

if TYPE_CHECKING:
    from resources.judging.calibration import Calibration

app = typer.Typer(help="The judge model.", no_args_is_help=True)

#: Why a call fails when the server is at fault, and not the judge.
AWAY = {"unreachable", "timeout", "no_completion"} | {f"http_{n}" for n in range(300, 600)}
Out = Annotated[Path | None, typer.Option(help="Folder of report.html.")]


@app.command()
def calibrate(
    labels: Annotated[Path, typer.Option(help="JSON lines that people labelled.")], out: Out = None
) -> None:
    """Ask the judge about labelled answers and keep how far it agrees, in data/judges.json."""
    from resources.judging import calibration
    from resources.judging.judge import cache_folder, endpoint_of, judged

    settings = Settings.from_env()
    params = configured(settings)
    known = calibration.read_labels(labels)
    endpoint = endpoint_of(params.model, settings)
    found = judged(
        endpoint, cache_folder(settings), lambda judge: calibration.calibrate(judge, known)
    )
    if silent := [item for item in found if not item.served and set(item.invalid) <= AWAY]:
        raise ServiceError(
            f"The judge answered nothing; what was known of it is kept: {silent[0].invalid}",
            where=endpoint.address,
            next="start its server, or correct JUDGE_URL, JUDGE_API_KEY or scorecard.judge.model",
        )
    store = store_path(settings)
    kept = calibration.read_store(store) | {item.version: item for item in found}
    calibration.write_store(store, kept)
    print_all(found, params.min_kappa)
    print(f"kept in {store}; commit it, and scores of these versions count")
    write(found, out, params.min_kappa)


@app.command()
def report(out: Out = None) -> None:
    """What is known of every judge that was calibrated, and of the one in use."""
    from resources.judging import calibration, rubric

    settings = Settings.from_env()
    judge = load_params(settings.root / "params.yaml").scorecard.judge
    store = calibration.read_store(store_path(settings))
    floor = (judge or Judge(model="none")).min_kappa
    print_all(list(store.values()), floor)
    if judge is not None:
        print(f"params.yaml's judge, {judge.model}:")
        for name in judge.criteria:
            version = rubric.form(name).version(judge.model)
            doubt = calibration.uncalibrated(store.get(version), floor)
            print(f"  {name}  {version}  {'may decide' if doubt is None else doubt}")
    write(list(store.values()), out, floor)


def print_all(found: list[Calibration], floor: float) -> None:
    """A line a judge, and why it may not decide."""
    from resources.judging.calibration import uncalibrated
    from resources.judging.report import said

    if not found:
        print("no judge has been calibrated: ratchet judge calibrate --labels FILE")
    for item in found:
        flips = f", orders differ {said(item.flip_rate)}" if item.flip_rate else ""
        print(
            f"{item.model}  {item.form}  {item.version}\n"
            f"  kappa {said(item.kappa)}, right {said(item.right)} of {item.n}{flips}, "
            f"no verdict {sum(item.invalid.values())}"
        )
        doubt = uncalibrated(item, floor)
        print("  may decide" if doubt is None else f"  may not decide: {doubt}")


def write(found: list[Calibration], out: Path | None, floor: float) -> None:
    from resources.judging.report import write_report

    if out is not None:
        print(f"report: {write_report(found, out, floor=floor)}")


def store_path(settings: Settings) -> Path:
    return settings.root / "data" / "judges.json"


def configured(settings: Settings) -> Judge:
    """The judge of params.yaml. Raises ConfigError where there is none."""
    judge = load_params(settings.root / "params.yaml").scorecard.judge
    if judge is None:
        raise ConfigError(
            "params.yaml names no judge.",
            where="params.yaml: scorecard.judge",
            next="scorecard.judge: { model: <the server's name of it> }, and JUDGE_URL",
        )
    return judge
