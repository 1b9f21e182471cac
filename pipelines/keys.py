"""`ratchet keys`: virtual keys of the gateway. A token is shown once, when it is made."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from contracts.errors import InputError
from contracts.settings import Settings
from resources.keys import Issued, Key, KeyStore

app = typer.Typer(help="Virtual keys: create, list, rotate, revoke.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whom requests and costs belong to.")],
    name: Annotated[str, typer.Option(help="For people: who uses it, and where.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A logical model it may name; repeat. None: all.")
    ] = None,
    release: Annotated[
        list[str] | None, typer.Option(help="A channel or release id that may answer; repeat.")
    ] = None,
    feature: Annotated[str | None, typer.Option(help="What costs are attributed to.")] = None,
    guard: Annotated[str | None, typer.Option(help="Guard policy.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="After how long (90d, 12h), or when (2027-01-31, UTC).")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
    tokens_per_minute: Annotated[int | None, typer.Option()] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option()] = None,
    session_tokens: Annotated[int | None, typer.Option(help="Per session and window.")] = None,
    session_seconds: Annotated[int | None, typer.Option(help="That window.")] = None,
    spend_day: Annotated[float | None, typer.Option(help="Budget of a UTC day.")] = None,
    spend_month: Annotated[float | None, typer.Option(help="Budget of a UTC month.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and show its token, once."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
        "max_prompt_tokens": max_prompt_tokens,
        "session_tokens": session_tokens,
        "session_seconds": session_seconds,
        "spend_day": spend_day,
        "spend_month": spend_month,
    }
    issued = _store().create(
        tenant,
        name,
        models=model or (),
        releases=release or (),
        feature=feature,
        guard=guard,
        expires=_moment(expires) if expires else None,
        limits=limits,
    )
    _show_token(issued, as_json)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: Json = False,
) -> None:
    """Every key, revoked ones too. Tokens cannot be shown again."""
    keys = [key for key in _store().list() if tenant in (None, key.tenant)]
    if as_json:
        print(json.dumps([_record(key) for key in keys], indent=2))
    else:
        print("\n".join(map(_line, keys)) or "there is no key; make one: ratchet keys create")


@app.command()
def rotate(
    key: Annotated[str, typer.Argument(help="The key's id.")],
    grace: Annotated[str, typer.Option(help="How long the old token counts: 0s, 30m, 7d.")] = "0s",
    as_json: Json = False,
) -> None:
    """A new token for the same key and policy, shown once."""
    _show_token(_store().rotate(_id(key), _seconds(grace)), as_json)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id.")], as_json: Json = False
) -> None:
    """End a key for good; every gateway refuses it within two seconds."""
    gone = _store().revoke(_id(key))
    print(json.dumps(_record(gone), indent=2) if as_json else f"revoked {gone.id} ({gone.name})")


def _store() -> KeyStore:
    return KeyStore.open(Settings.from_env())


def _id(text: str) -> str:
    """The id, also of someone who gave a whole token; that token must not reach an error."""
    return text.removeprefix("rk_").partition(".")[0]


def _seconds(text: str) -> float:
    """``90d`` as seconds. Raises InputError."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if not found:
        raise InputError(
            f"{text!r} is not a span of time.", next="write a number and s, m, h or d, e.g. 30m"
        )
    return float(int(found[1]) * _UNITS[found[2]])


def _moment(text: str) -> float:
    """``90d`` from now, or an ISO date or time (UTC unless it says otherwise), as Unix seconds."""
    if re.fullmatch(r"\d+[smhd]", text):
        return time.time() + _seconds(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{text!r} is neither a span nor a date.", next="write e.g. 90d or 2027-01-31"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _show_token(issued: Issued, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"token": issued.token, "key": _record(issued.key)}, indent=2))
    else:
        print(f"{issued.token}\n\nThis token is shown only now. {_line(issued.key)}")


def _record(key: Key) -> dict[str, Any]:
    return {**key.model_dump(mode="json"), "state": _state(key)}


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "active" if key.usable(time.time()) else "expired"


def _line(key: Key) -> str:
    """One key as a terminal shows it."""
    limits = key.limits.model_dump(exclude_none=True)
    parts = [
        key.id,
        f"{_state(key):<7}",
        key.tenant,
        repr(key.name),
        f"made {_day(key.created)}",
        *([f"until {_day(key.expires)}"] if key.expires else []),
        *([f"models {','.join(key.models)}"] if key.models else []),
        *([f"releases {','.join(key.releases)}"] if key.releases else []),
        *(f"{name}={value:g}" for name, value in limits.items()),
    ]
    return "  ".join(parts)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
