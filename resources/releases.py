"""Installed releases and channels: what serving reads, and never the folder that DVC rewrites.

In: ``data/release.json`` and the members it names. Out: ``<state>/releases/<id>/`` with the
release's own copies of index, bundle, prompts and chunks, each checked against its digest; and
``<state>/channels/<name>.json``, a pointer at one installed release.

A release folder appears whole or not at all: members are copied and checked in a folder beside it,
``release.json`` is written last, then one rename. A process killed half-way leaves only that
temporary folder, which the next install removes. Installing is safe to repeat and to race.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from contracts.digests import path_md5, path_size
from contracts.errors import GateError, InputError, NotFoundError, RatchetError
from contracts.params import Answers, Vectors
from contracts.records import Channel, Member, Release
from contracts.settings import Settings
from resources.prompts import Prompts, PromptVersion, read

#: Members that serving needs, and what they are called in an installed release.
INSTALLED = {
    "index": "index",
    "bundle": "bundle",
    "prompts": "prompts.json",
    "chunks": "chunks.parquet",
}
#: ``chunks`` serves traces; an answer needs only the rest.
REQUIRED = ("index", "bundle", "prompts")
MARKER = "release.json"
_ID = re.compile(r"[0-9a-f]{16}")
_CHANNEL = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TEMPORARY = ".installing-"


@dataclass(frozen=True)
class Installed:
    """An installed release: its record and the folder of its copies."""

    release: Release
    path: Path

    @property
    def id(self) -> str:
        return self.release.id

    @property
    def index(self) -> Path:
        return self.path / INSTALLED["index"]

    @property
    def bundle(self) -> Path:
        return self.path / INSTALLED["bundle"]

    @property
    def chunks(self) -> Path:
        return self.path / INSTALLED["chunks"]

    @property
    def answers(self) -> Answers:
        """How answers are made: the block that the release was certified with."""
        return Answers.model_validate(self.release.params["answers"])

    @property
    def vectors(self) -> Vectors:
        """The embedding model that the index was built with."""
        return Vectors.model_validate(self.release.params["vectors"])

    def prompts(self) -> Prompts:
        """Every prompt version that the release holds."""
        return read(self.path / INSTALLED["prompts"])

    def prompt(self) -> PromptVersion:
        """The prompt version that the release names. Raises InputError if its text is another."""
        wanted = self.release.prompt
        found = self.prompts().get(wanted["name"], wanted["version"])
        if found.sha256 != wanted["sha256"]:
            raise InputError(
                f"The text of {found} is not the one that release {self.id} names.",
                where=str(self.path),
                next="deploy the release again",
            )
        return found


def read_release(path: Path) -> Release:
    """Read and check a release file: its form, and that its id is the hash of its content."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        release = Release.model_validate(body)
    except FileNotFoundError:
        raise NotFoundError(
            "The release file does not exist.",
            where=str(path),
            next="build it: `dvc repro release`",
        ) from None
    except ValidationError as error:
        offenders = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError("This is not a release.", where=str(path), offenders=offenders) from None
    except (OSError, ValueError) as error:
        raise InputError(f"The release file cannot be read: {error}", where=str(path)) from None
    if (computed := Release.compute_id(body)) != release.id:
        raise InputError(
            f"The release says that its id is {release.id}, but its content hashes to {computed}: "
            "it was edited after it was made.",
            where=str(path),
            next="restore the file, or build it again: `dvc repro release`",
        )
    return release


def certified(release: Release, where: str) -> Release:
    """``release`` if its gate said PASS. Raises GateError otherwise."""
    verdict = release.gate.get("verdict")
    if verdict != "PASS":
        raise GateError(
            f"Release {release.id} is not certified: its gate says {verdict}.",
            where=where,
            next="read the reasons in data/gate/report.html",
        )
    return release


def install(release_json: Path, data_root: Path, settings: Settings) -> Path:
    """Copy what serving needs of a release into ``<state>/releases/<id>/``; return that folder.

    Args:
        release_json: the release file.
        data_root: the folder that the members' paths are relative to (the checkout).
        settings: whose state folder to install into.

    Raises InputError naming every member that is missing or does not have its digest.
    """
    release = read_release(release_json)
    _check_form(release, str(release_json))
    final = settings.releases_dir / release.id
    with _locked(settings.releases_dir):
        _sweep(settings.releases_dir)
        if final.is_dir() and not damage(Installed(release, final)):
            return final
        part = settings.releases_dir / f"{_TEMPORARY}{release.id}-{os.getpid()}"
        try:
            part.mkdir()
            _copy(release, data_root, part)
            offenders = damage(Installed(release, part))
            if offenders:
                raise InputError(
                    f"The data here is not what release {release.id} names.",
                    where=str(data_root),
                    offenders=offenders,
                    next="`dvc checkout` at the release's commit "
                    f"({release.git_commit[:12]}), or build a new release",
                )
            _write(part / MARKER, release_json.read_text(encoding="utf-8"))
            if final.exists():  # damaged: out of the way first, a rename cannot replace a folder
                final.rename(settings.releases_dir / f"{_TEMPORARY}damaged-{os.getpid()}")
            part.rename(final)
            _sync(settings.releases_dir)
        except OSError as error:
            # copytree collects its failures: (source, target, reason) each
            first = error.args[0][0] if isinstance(error, shutil.Error) else None
            raise InputError(
                f"The release could not be installed: {first[2] if first else error.strerror}.",
                where=str(first[1] if first else error.filename or part),
                next="check the disk (df -h) and deploy again",
            ) from error
        finally:
            _sweep(settings.releases_dir)
    return final


def load(settings: Settings, release_id: str) -> Installed:
    """The installed release of that id. Raises NotFoundError naming those that are installed."""
    if not _ID.fullmatch(release_id):
        raise InputError(f"'{release_id}' is not a release id (16 hex digits).")
    path = settings.releases_dir / release_id
    if not (path / MARKER).is_file():
        known = ", ".join(item.id for item in list_releases(settings)) or "none"
        raise NotFoundError(
            f"Release {release_id} is not installed here.",
            where=str(settings.releases_dir),
            next=f"installed: {known}; deploy it: python -m serving.deploy up --release FILE",
        )
    return Installed(read_release(path / MARKER), path)


def verify(settings: Settings, release_id: str) -> Installed:
    """:func:`load`, with every copied member checked against its digest."""
    installed = load(settings, release_id)
    offenders = damage(installed)
    if offenders:
        raise InputError(
            f"Installed release {release_id} is damaged.",
            where=str(installed.path),
            offenders=offenders,
            next="deploy it again: python -m serving.deploy up --release FILE",
        )
    return installed


def list_releases(settings: Settings) -> list[Installed]:
    """Installed releases, oldest first. Folders without a right marker are left out."""
    found: list[tuple[int, Installed]] = []
    for marker in settings.releases_dir.glob(f"[0-9a-f]*/{MARKER}"):
        with contextlib.suppress(RatchetError, OSError):
            installed = Installed(read_release(marker), marker.parent)
            found.append((marker.stat().st_mtime_ns, installed))
    return [item for _, item in sorted(found, key=lambda pair: (pair[0], pair[1].id))]


def damage(installed: Installed) -> list[str]:
    """Every copied member that is missing or whose bytes are not what the release names."""
    wrong = []
    for key, member in _members(installed.release):
        path = installed.path / INSTALLED[key]
        if not path.exists():
            wrong.append(f"{key} ({member.path}): missing")
        elif (size := path_size(path)) != member.size:
            wrong.append(f"{key} ({member.path}): {size} bytes, the release names {member.size}")
        elif (digest := path_md5(path)) != member.md5:
            wrong.append(f"{key} ({member.path}): md5 {digest}, the release names {member.md5}")
    return wrong


# -- channels --------------------------------------------------------------------------------


def channel_path(settings: Settings, name: str) -> Path:
    """Where the pointer of that channel stands. Raises InputError for a name that is none."""
    if not _CHANNEL.fullmatch(name):
        raise InputError(
            f"'{name}' is not a channel name.",
            next="lower-case letters, digits and '-', e.g. stable",
        )
    return settings.channels_dir / f"{name}.json"


def read_channel(settings: Settings, name: str) -> Channel | None:
    """The channel's pointer, or None when it was never set."""
    path = channel_path(settings, name)
    try:
        return Channel.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"The channel's pointer cannot be read: {error}",
            where=str(path),
            next="deploy a release to this channel: it writes the pointer anew",
        ) from None


def write_channel(settings: Settings, channel: Channel) -> Path:
    """Point the channel at its release, in one atomic step that survives a power cut."""
    path = channel_path(settings, channel.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    _write(part, channel.model_dump_json(indent=2) + "\n")
    part.replace(path)
    _sync(path.parent)
    return path


def list_channels(settings: Settings) -> list[Channel]:
    """Every channel that points somewhere, by name."""
    names = sorted(path.stem for path in settings.channels_dir.glob("[a-z]*.json"))
    found = (read_channel(settings, name) for name in names)
    return [channel for channel in found if channel is not None]


# -- inside ----------------------------------------------------------------------------------


def _members(release: Release) -> Iterator[tuple[str, Member]]:
    for key in INSTALLED:
        if key in release.members:
            yield key, release.members[key]


def _check_form(release: Release, where: str) -> None:
    """Refuse a release that could be installed and then not be served."""
    wrong = [f"members.{key}: missing" for key in REQUIRED if key not in release.members]
    wrong += [
        f"members.{key}.path: {member.path} leads out of the checkout"
        for key, member in _members(release)
        if Path(member.path).is_absolute() or ".." in Path(member.path).parts
    ]
    wrong += [
        f"prompt.{key}: missing"
        for key in ("name", "version", "sha256")
        if key not in release.prompt
    ]
    blocks: dict[str, Any] = {"answers": Answers, "vectors": Vectors}
    for name, block in blocks.items():
        try:
            block.model_validate(release.params.get(name))
        except ValidationError as error:
            wrong.append(f"params.{name}: {error.errors()[0]['msg']}")
    if not _ID.fullmatch(release.id):
        wrong.append("id: not 16 hex digits")
    if wrong:
        raise InputError("The release cannot be served.", where=where, offenders=wrong)


def _copy(release: Release, data_root: Path, part: Path) -> None:
    """Copy the members that are there; :func:`damage` names those that are not."""
    for key, member in _members(release):
        source, target = data_root / member.path, part / INSTALLED[key]
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copyfile(source, target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One install at a time; the kernel drops the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove temporary folders. Called under the lock, so nobody is working in one."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
