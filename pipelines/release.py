"""`ratchet release`: what a release is made of, how two differ, whether one is whole and can be
built again, and the documents that are written from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from contracts.errors import NotFoundError
from contracts.records import Release
from contracts.settings import Settings

app = typer.Typer(
    help="Releases: list, show, diff, verify, reproduce, model card.", no_args_is_help=True
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Which = Annotated[
    str | None,
    typer.Argument(
        help="An installed release's id (or how it begins), a channel, or a file; "
        "data/release.json without it."
    ),
]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Installed releases, oldest first, and the channels that point at them."""
    from resources import releases

    settings = Settings.from_env()
    channels = {c.release: c.name for c in releases.list_channels(settings)}
    found = releases.list_releases(settings)
    if as_json:
        rows = [item.release.model_dump() | {"channel": channels.get(item.id)} for item in found]
        print(json.dumps(rows, indent=2))
        return
    for item in found:
        where = f"  on {channels[item.id]}" if item.id in channels else ""
        gate, commit = item.release.gate.get("verdict"), item.release.git_commit
        print(f"{item.id}  gate {gate}  git {commit[:12]}{where}")
    if not found:
        print("no release is installed here; `ratchet run deploy` installs data/release.json")


@app.command()
def show(release: Which = None, as_json: Json = False) -> None:
    """Every input of a release, by digest."""
    found, path = find(release, Settings.from_env())
    print(found.model_dump_json(indent=2) if as_json else render(found, path))


@app.command()
def diff(before: str, after: Which = None, as_json: Json = False) -> None:
    """What differs between two releases: members, parameters, prompt, gate."""
    from resources import release_diff

    settings = Settings.from_env()
    (one, _), (two, _) = find(before, settings), find(after, settings)
    changes = release_diff.diff(one, two)
    if as_json:
        print(json.dumps(release_diff.as_json(changes), indent=2))
        return
    print(f"{one.id} -> {two.id}: {len(changes)} differences")
    for change in changes:
        print(f"  {change.kind:<7} {change.name:<32} {_short(change.before)} -> "
              f"{_short(change.after)}")  # fmt: skip
    for line in release_diff.prompt_texts(one, two, settings):
        print(f"  {line}")


@app.command()
def verify(release: Which = None) -> None:
    """Hash every byte of a release that is here. Exit status 1 names what is wrong."""
    from resources import releases
    from resources.release_reproduce import different

    settings = Settings.from_env()
    found, path = find(release, settings)
    if path.parent.parent == settings.releases_dir:
        releases.verify(settings, found.id)
        print(f"release {found.id}: {len(releases.INSTALLED)} installed members are whole")
        return
    wrong = different(found, settings.root)
    if wrong:
        raise NotFoundError(
            f"This checkout does not hold what release {found.id} names.",
            where=str(settings.root),
            offenders=wrong,
            next="`dvc checkout` at the commit of its dvc.lock, or `ratchet release reproduce`",
        )
    print(f"release {found.id}: id and {len(found.members)} members are right")


@app.command()
def reproduce(release: Which = None, as_json: Json = False) -> None:
    """Fresh checkout, `dvc pull`, `dvc repro` does nothing, equal ids. Exit status 1 if not."""
    from dataclasses import asdict

    from resources.release_reproduce import reproduce as run

    settings = Settings.from_env()
    found, path = find(release, settings)
    came = run(path, settings, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(asdict(came) | {"same": came.same}, indent=2))
    elif came.same:
        print(
            f"release {found.id} was built again from commit {came.commit[:12]}: "
            f"nothing to run, {len(found.members)} members and the id are the same"
        )
    else:
        print(f"release {found.id} could not be built again from commit {came.commit[:12]}:")
        print(f"  id there: {came.found or 'none'}")
        for name in came.stale:
            print(f"  dvc would run: {name}")
        for line in came.wrong:
            print(f"  {line}")
    if not came.same:
        raise typer.Exit(1)


@app.command()
def certified(as_json: Json = False) -> None:
    """Which prompt version passed the gate with which model; no other pair is served."""
    from contextlib import closing

    from resources import certification, releases
    from resources.ledger import Ledger

    settings = Settings.from_env()
    with closing(Ledger.open(settings)) as ledger:
        pairs = certification.matrix(ledger)
    if as_json:
        print(json.dumps(certification.as_json(pairs), indent=2))
        return
    live = {c.release: c.name for c in releases.list_channels(settings)}
    names = {pair.model: live[pair.release] for pair in pairs if pair.release in live}
    print(certification.render(pairs, names))


@app.command()
def card(
    release: Which = None,
    technical: Annotated[
        bool,
        typer.Option("--technical-file", help="The technical file in the order of Annex IV."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A file; the terminal without it.")] = None,
) -> None:
    """The model card, or the technical file, written from the release and its evidence."""
    from resources import release_card

    settings = Settings.from_env()
    found, _ = find(release, settings)
    text = (release_card.technical_file if technical else release_card.model_card)(found, settings)
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}")


def find(name: str | None, settings: Settings) -> tuple[Release, Path]:
    """A release and its file, by what a person calls it. Raises NotFoundError, InputError."""
    from resources import releases

    if name is None:
        path = settings.root / "data" / "release.json"
        return releases.read_release(path), path
    if name.endswith(".json") or Path(name).is_file():
        return releases.read_release(Path(name)), Path(name)
    for channel in releases.list_channels(settings):
        if channel.name == name:
            name = channel.release
    known = [item for item in releases.list_releases(settings) if item.id.startswith(name)]
    if len(known) != 1:
        listed = ", ".join(item.id for item in releases.list_releases(settings)) or "none"
        what = "more than one installed release" if known else "no installed release"
        raise NotFoundError(f"'{name}' names {what}.", next=f"installed: {listed}")
    return known[0].release, known[0].path / releases.MARKER


def render(release: Release, path: Path) -> str:
    """A release as a terminal shows it."""
    prompt = release.prompt
    lines = [
        f"release {release.id}   gate {release.gate.get('verdict')}   git {release.git_commit}",
        f"  file    {path}",
        f"  prompt  {prompt['name']}/{prompt['version']}  sha256 {prompt['sha256'][:16]}",
        f"  model   {release.model.get('name')}  {release.model.get('architecture')}",
        f"  policy  sha256 {str(release.gate.get('policy_sha256'))[:16]}",
        "  members",
    ]
    width = max(map(len, release.members))
    for name, member in release.members.items():
        lines.append(f"    {name:<{width}}  {member.md5:<36}  {member.size:>12,}  {member.path}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
