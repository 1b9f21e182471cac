"""The `ratchet` command. Each command is a thin door to a module of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from contracts import offline
from contracts.errors import RatchetError
from contracts.settings import Settings
from pipelines import approvals, cache, gate, index, judge, keys, ledger, release, rollout

app = typer.Typer(
    help="Ratchet: the whole life of an LLM application as one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


app.add_typer(approvals.app, name="approvals")
app.add_typer(cache.app, name="cache")
app.add_typer(gate.app, name="gate")
app.add_typer(index.app, name="index")
app.add_typer(judge.app, name="judge")
app.add_typer(keys.app, name="keys")
app.add_typer(ledger.app, name="ledger")
app.add_typer(release.app, name="release")
app.add_typer(rollout.app, name="rollout")


def show(value: Any, as_json: bool, render: Callable[[Any], str]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else render(value))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what is missing, which addresses answer, what would run where."""
    from pipelines import doctor as module

    found = module.doctor(Settings.from_env())
    show(found, as_json, module.render)
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")], as_json: Json = False
) -> None:
    """Ask the gateway; the answer comes with its citations."""
    from pipelines import ask as module

    show(module.ask(question, Settings.from_env()), as_json, module.render)


@app.command()
def trace(
    response_id: Annotated[str, typer.Argument(help="From `ratchet ask`, or the response header.")],
    as_json: Json = False,
) -> None:
    """From an answer back to the bytes it came from."""
    from pipelines import trace as module

    show(module.trace(response_id, Settings.from_env()), as_json, module.render)


@app.command()
def status(as_json: Json = False) -> None:
    """What stands, what serves, what waits."""
    from pipelines import status as module

    show(module.status(Settings.from_env()), as_json, module.render)


@app.command()
def run(
    job: Annotated[
        str, typer.Argument(help="sources, knowledge, lifecycle, deploy, try_release or nightly.")
    ],
    partition: Annotated[str | None, typer.Option(help="A source, or a day.")] = None,
) -> None:
    """Run one Dagster job here; the UI shows the run afterwards."""
    from pipelines import run as module

    print(f"Dagster run {module.run_job(job, partition, Settings.from_env())}")


@app.command()
def up() -> None:
    """Dagster, MLflow, engine and gateway in the foreground; Ctrl-C ends them all."""
    from pipelines import up as module

    module.up(Settings.from_env(), say=lambda line: print(line, flush=True))


@app.command()
def down() -> None:
    """Stop the engines that this checkout started."""
    from pipelines import up as module

    raise typer.Exit(module.deploy(Settings.from_env(), "down", "--all"))


@app.command()
def track() -> None:
    """Log waiting stage executions into MLflow now."""
    from resources.tracking import drain, pending

    settings = Settings.from_env()
    logged = drain(settings, linger=0.0)
    print(f"{logged} stage executions logged, {len(pending(settings))} left to another tracker")


def main() -> None:
    """Run the command; a RatchetError is one clear message and an exit code."""
    offline.apply()
    try:
        app(prog_name="ratchet")
    except RatchetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
