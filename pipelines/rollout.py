"""`ratchet rollout`: try a release beside the one that serves, see how it does, take it back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from contracts.settings import Settings

app = typer.Typer(
    help="Rollouts: canary, A/B, shadow, blue-green; start, status, abort.", no_args_is_help=True
)
Channel = Annotated[str, typer.Option(help="The channel.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@app.command()
def start(
    release: Annotated[
        str, typer.Option(help="A release file, or the id of an installed one.")
    ] = "data/release.json",
    channel: Channel = "stable",
    strategy: Annotated[
        str, typer.Option(help="canary, ab, shadow, blue_green or direct; else the policy's.")
    ] = "",
    policy: Annotated[str, typer.Option(help="A file; else data/policies/rollout.yaml.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "",
) -> None:
    """Begin a rollout. `ratchet up` and the sensor `rollout_tick` do the rest."""
    found = call(
        "start", "--release", release, "--channel", channel, "--reason", reason,
        *(("--strategy", strategy) if strategy else ()), *(("--policy", policy) if policy else ()),
    )  # fmt: skip
    if "rollout" in found:
        print(f"rollout {found['rollout']} of {found['release']} begun: {found['strategy']}")
    else:
        print(f"channel {found['channel']} serves {found['release']}")


@app.command()
def status(channel: Channel = "stable", as_json: Json = False) -> None:
    """The open rollout with its evidence, and how the last one ended."""
    found = call("status", "--channel", channel)
    print(json.dumps(found, indent=2) if as_json else render(found))


@app.command()
def abort(
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")], channel: Channel = "stable"
) -> None:
    """Take the candidate back now."""
    found = call("abort", "--channel", channel, "--reason", reason)
    print(f"taken back, row {found['ledger']} of the ledger")


def call(*arguments: str) -> dict[str, Any]:
    """What `python -m serving.rollout` prints. Ends the command as that one ended."""
    result = subprocess.run(
        [sys.executable, "-m", "serving.rollout", *arguments],
        cwd=Settings.from_env().root, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise typer.Exit(result.returncode)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def render(value: dict[str, Any]) -> str:
    """For a terminal: one line a metric."""
    lines = []
    if (now := value["rollout"]) is None:
        lines.append(f"no rollout is under way on {value['channel']}")
    else:
        lines.append(
            f"{now['id']}: {now['release']} beside {now['stable']}, {now['strategy']}, step "
            f"{now['step']}, share {now['share']:g}"
        )
        lines.append(f"  {now.get('next', 'hold')}: {now.get('why', 'no traffic yet')}")
        lines += [_finding(item) for item in now["findings"]]
    if (last := value["last"]) is not None:
        lines.append(f"last: {last['did']} at {last['time'][:19]}Z: {last['why']}")
    return "\n".join(lines)


def _finding(item: dict[str, Any]) -> str:
    def share(loss: float | None) -> str:
        return "     -" if loss is None else f"{loss:6.1%}"

    said = f"  {item['name']:<13} candidate {share(item['candidate'])}  stable "
    said += f"{share(item['stable'])}  harm {_of(item['worse'], item['limit'])}"
    if item["wanted"] is not None:
        said += f"  no harm {_of(item['no_worse'], item['wanted'])}"
    return said


def _of(evidence: float | None, wanted: float) -> str:
    """How much of the evidence that is wanted there is; the ledger keeps infinity as null."""
    return "100%" if evidence is None else f"{min(max(evidence / wanted, 0.0), 1.0):4.0%}"
