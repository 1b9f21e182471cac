"""`ratchet index`: which versions of the knowledge are here, and which one is published."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from contracts.params import load_params
from contracts.settings import Settings
from resources import published

app = typer.Typer(help="The published index: versions, publish, rollback.", no_args_is_help=True)


@app.command()
def versions() -> None:
    """What was published, rolled back and removed, oldest first; * is live."""
    print(render(published.versions(Settings.from_env())))


@app.command()
def publish(
    accept_change: Annotated[
        bool,
        typer.Option("--accept-change", help="Also if it moved further than the policy allows."),
    ] = False,
) -> None:
    """Publish data/index, if it passes the policy in params.yaml."""
    from assets.publishing import publish_knowledge

    settings = Settings.from_env()
    before = published.published(settings)
    pointer = publish_knowledge(settings, accept_change)
    same = before is not None and before["seq"] == pointer["seq"]
    print("already published:" if same else "published", told(pointer))
    print(f"what changed: {pointer['change']}")


@app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="A version, or how its name begins.")] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Show again what was deleted since that version.")
    ] = False,
) -> None:
    """Go back to the version before this one, or to --to. Deleted documents stay hidden."""
    pointer = published.rollback(Settings.from_env(), to, restore)
    print("back to", told(pointer))


@app.command()
def gc() -> None:
    """Remove versions beyond params.yaml: index.keep; never the live one or one being read."""
    settings = Settings.from_env()
    gone = published.collect(settings, load_params(settings.root / "params.yaml").index.keep)
    print("\n".join(f"removed {name}" for name in gone) or "nothing to remove")


def told(pointer: dict[str, Any]) -> str:
    """What the pointer shows now, in a line."""
    return (
        f"{pointer['version']}: {pointer['chunks']} chunks of {pointer['documents']} documents; "
        f"documents hidden: {len(pointer['tombstones'])}"
    )


def render(lines: list[dict[str, Any]]) -> str:
    """The ledger as a terminal shows it."""
    if not lines:
        return "no index has been published yet"
    return "\n".join(
        f"{'*' if line['live'] else ' '} {line['seq']:>4}  {line['time']}  {line['event']:<8}  "
        f"{line['version']}  "
        + (f"{line['chunks']} chunks, {line['hidden']} hidden" if "chunks" in line else "")
        + ("" if line["stored"] else "  (removed)")
        for line in lines
    )
