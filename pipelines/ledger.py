"""`ratchet ledger`: who let which release onto which channel, when and why."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from contracts.errors import InputError, NotFoundError
from contracts.settings import Settings
from resources.ledger import Entry, Head, Ledger, Served

app = typer.Typer(
    help="The ledger of promotions: log, show, at, verify, follow.", no_args_is_help=True
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@app.command()
def log(
    channel: Annotated[str | None, typer.Option(help="Only this channel's.")] = None,
    release: Annotated[str | None, typer.Option(help="Only this release's.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="promoted, approved ...; repeat.")] = None,
    since: Annotated[str | None, typer.Option(help="As for `at`.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Only the newest so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Rows, oldest first."""
    found = _open().entries(
        channel=channel,
        release=release,
        kinds=kind or (),  # type: ignore[arg-type]
        since=moment(since) if since else None,
        limit=count,
    )
    if as_json:
        print(json.dumps([row.model_dump() for row in found], indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(line, found)) or "the ledger has no such row")


@app.command()
def show(seq: int, as_json: Json = False) -> None:
    """One row, whole."""
    row = _open().get(seq)
    if row is None:
        raise NotFoundError(f"The ledger has no row {seq}.", next="ratchet ledger log")
    if as_json:
        print(row.model_dump_json(indent=2))
        return
    for name, value in row.model_dump(exclude={"body"}).items():
        print(f"{name:<8} {value}")
    print(f"body     {json.dumps(row.body, indent=2, ensure_ascii=False)}")


@app.command(context_settings={"ignore_unknown_options": True})
def at(
    time: Annotated[str, typer.Argument(help='-2h, "2026-11-20 14:02" (UTC), or RFC 3339.')],
    as_json: Json = False,
) -> None:
    """What each channel served at a time, who let it in, and who had approved it."""
    when = moment(time)
    found = _open().at(when)
    if as_json:
        print(json.dumps({name: served(one) for name, one in found.items()}, indent=2))
        return
    print(f"at {when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")
    for name, one in found.items():
        print(f"{name:<9} {one.pointer.release}")
        if (beside := one.pointer.candidate) is not None:
            print(f"{'':<9} beside it {beside.release}, {beside.strategy}, share {beside.share:g}")
        print(f"{'':<9} let in: {line(one.let_in)}")
        print(f"{'':<9} approved: {line(one.approval) if one.approval else 'nobody had to'}")
    if not found:
        print("no channel served anything")


@app.command()
def verify(
    head: Annotated[str | None, typer.Option(help="SEQ:HASH, noted elsewhere earlier.")] = None,
    as_json: Json = False,
) -> None:
    """Is every row as it was written, and does every pointer agree? Exit status 1 if not.

    Prints the head: noted where nobody who can write this ledger can change it, it shows later
    that no row is missing.
    """
    from resources import promotion

    settings = Settings.from_env()
    ledger = Ledger.open(settings)
    problems = ledger.verify(Head.parse(head) if head else None)
    if not problems:  # rows that cannot be read tell nothing about pointers
        problems = promotion.differences(settings, ledger)
    newest = ledger.head() if not problems else None
    if as_json:
        value = {"head": str(newest) if newest else None, "problems": problems}
        print(json.dumps(value, indent=2))
    elif problems:
        print(f"{ledger.where}: {len(problems)} problems", file=sys.stderr)
        print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
    else:
        print(f"{ledger.where}: {newest.seq if newest else 0} rows, all as they were written")
        print(f"head {newest}" if newest else "head: none yet")
    if problems:
        raise typer.Exit(1)


@app.command()
def follow() -> None:
    """Bring MLflow's aliases and the gate's baseline to what the ledger says."""
    from assets.following import follow as run

    settings = Settings.from_env()
    print("\n".join(run(settings, Ledger.open(settings))) or "all agree with the ledger")


def moment(text: str, now: datetime | None = None) -> datetime:
    """``-2h``, ``2026-11-20 14:02`` (UTC unless it says otherwise) or RFC 3339, as aware time.

    Raises InputError.
    """
    now = now or datetime.now(UTC)
    if found := re.fullmatch(r"-(\d{1,6})([smhd])", text):
        return now - timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{text!r} is no time.",
            next='write -2h, "2026-11-20 14:02" or 2026-11-20T14:02:00+01:00',
        ) from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def line(row: Entry) -> str:
    """A row as one line."""
    reason = f": {' '.join(row.reason.split())}" if row.reason else ""
    return f"{row}{reason}"


def served(one: Served) -> dict[str, Any]:
    """For scripts."""
    return {
        "release": one.pointer.release,
        "candidate": one.pointer.candidate.model_dump() if one.pointer.candidate else None,
        "let_in": one.let_in.model_dump(),
        "approval": one.approval.model_dump() if one.approval else None,
        "change": one.change.model_dump(),
    }


def _open() -> Ledger:
    return Ledger.open(Settings.from_env())
