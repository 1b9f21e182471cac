"""`ratchet approvals`: which releases wait for a person, and their answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any

import typer

from contracts.settings import Settings
from resources import approvals, release_diff, releases
from resources.approvals import Request
from resources.ledger import Ledger

app = typer.Typer(help="Releases that wait for a named person.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Seq = Annotated[int, typer.Argument(help="The request: its row in the ledger.")]
Name = Annotated[str, typer.Option("--as", help="Who answers: your name.")]
Reason = Annotated[str, typer.Option(help="Why; it stands in the ledger.")]
Token = Annotated[
    str | None,
    typer.Option(help="From the request's link; not needed on the machine that asked."),
]


@contextmanager
def _opened() -> Iterator[tuple[Settings, Ledger]]:
    settings = Settings.from_env()
    with closing(Ledger.open(settings)) as ledger:
        yield settings, ledger


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Answered ones as well.")] = False,
    as_json: Json = False,
) -> None:
    """Requests that wait, oldest first."""
    with _opened() as (_, ledger):
        found = [r for r in approvals.requests(ledger) if everything or r.state == "waiting"]
    if as_json:
        print(json.dumps([_json(request) for request in found], indent=2))
        return
    for request in found:
        print(line(request))
    if not found:
        print("no release waits for an approval")


@app.command()
def show(seq: Seq, as_json: Json = False) -> None:
    """One request: its risk, and what differs from the live release."""
    with _opened() as (settings, ledger):
        request = approvals.find(ledger, seq)
    if as_json:
        print(json.dumps(_json(request), indent=2))
        return
    print(line(request))
    for reason in request.risk.reasons:
        print(f"  {reason}")
    if request.answer is not None:
        print(f"  {request.answer}: {request.answer.reason or 'no reason given'}")
    if request.against:
        one = releases.load(settings, request.against).release
        two = releases.load(settings, request.entry.release).release
        print(f"  differences: ratchet release diff {one.id} {two.id}")
        for text in release_diff.prompt_texts(one, two, settings):
            print(f"    {text}")


@app.command()
def link(seq: Seq) -> None:
    """The page of a request on the gateway's private port. Whoever has the link can answer."""
    with _opened() as (settings, ledger):
        request = approvals.find(ledger, seq)
        token = approvals.token_of(settings, request)
    print(f"{settings.private_url}/approvals/{seq}#token={token}")


@app.command()
def approve(seq: Seq, name: Name, reason: Reason = "", token: Token = None) -> None:
    """Let a release in, once."""
    _answer(seq, name, reason, token, yes=True)


@app.command()
def refuse(seq: Seq, name: Name, reason: Reason, token: Token = None) -> None:
    """Keep a release out."""
    _answer(seq, name, reason, token, yes=False)


@app.command()
def ask(
    release: Annotated[str, typer.Argument(help="An installed release, or a file.")],
    channel: Annotated[str, typer.Option(help="Where it is to serve.")] = "stable",
) -> None:
    """Ask for a release again, for example after a refusal."""
    from pipelines.release import find

    with _opened() as (settings, ledger):
        found, _ = find(release, settings)
        print(line(approvals.ask(settings, ledger, found, channel)))


def _answer(seq: int, name: str, reason: str, token: str | None, *, yes: bool) -> None:
    with _opened() as (settings, ledger):
        given = token or approvals.token_of(settings, approvals.find(ledger, seq))
        row = approvals.answer(
            settings, ledger, seq, token=given, approve=yes, name=name, reason=reason
        )
    print(f"ledger: {row}")
    if yes:
        print("the sensor `approved` deploys it within 30 s; or now: ratchet run deploy")


def line(request: Request) -> str:
    """A request in one line."""
    entry = request.entry
    return (
        f"{entry.seq:>5}  {request.state:<8}  release {entry.release} on {entry.channel}, "
        f"risk {request.risk.level}, asked {entry.time[:19].replace('T', ' ')} by {entry.actor}"
    )


def _json(request: Request) -> dict[str, Any]:
    body = {key: value for key, value in request.entry.body.items() if key != "token_sha256"}
    return {
        "request": request.seq,
        "state": request.state,
        "release": request.entry.release,
        "channel": request.entry.channel,
        "time": request.entry.time,
        "actor": request.entry.actor,
        **body,
        "answer": request.answer.model_dump() if request.answer else None,
    }
