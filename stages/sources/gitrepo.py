"""A git repository at a revision: ``git+https://host/x.git`` or ``git+../path``.

The repository is mirrored once, bare, into the caches; its files are read as blobs of the commit,
so there is no checkout and no filter or hook runs. A full commit id that the mirror holds needs no
network; a tag or a branch is fetched first, because it may have moved.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from posixpath import dirname, join, normpath

from contracts.errors import ConfigError, InputError, ServiceError
from stages.sources import containers
from stages.sources.files import File, Limits, Selection, shown

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LINK, SUBMODULE = "120000", "160000"


def git_files(
    url: str, revision: str, caches: Path, selection: Selection, limits: Limits
) -> Iterator[File]:
    """Files of the commit that ``revision`` names, in the order of their paths.

    Raises ServiceError when the repository cannot be had, InputError when it has no such revision.
    """
    mirror = _mirror(url, caches)
    commit = _resolve(mirror, url, revision)
    tree = _tree(mirror, commit)
    with _Blobs(mirror) as blobs:
        for path, (mode, blob, count) in tree.items():
            name = shown(path)
            if mode == SUBMODULE or not selection.wants(name):
                continue
            if mode == LINK:
                target = normpath(join(dirname(path), os.fsdecode(blobs.read(blob))))
                mode, blob, count = tree.get(target, (LINK, blob, count))
            if mode in (LINK, SUBMODULE):
                yield File(name, problem="a link that leads to no file of the repository")
            elif containers.is_container(name):
                too_large = _container_limit(count, limits)
                if too_large:
                    yield File(name, problem=too_large)
                    continue
                stream = io.BytesIO(blobs.read(blob))
                chosen = selection.members()
                yield from containers.members(name, stream, chosen, limits, prefix=True)
            elif problem := limits.too_large(count):
                yield File(name, problem=problem)
            else:
                yield File(name, blobs.read(blob))


def _container_limit(count: int, limits: Limits) -> str | None:
    return f"{count:,} bytes, over the limit of {limits.total:,}" if count > limits.total else None


def pinned_revision(revision: str | None, pin: Path, key: str) -> str:
    """``revision``, or the first word of the pin file. Raises ConfigError."""
    if revision is None:
        try:
            revision = next(iter(pin.read_text(encoding="utf-8").split()), None)
        except (OSError, UnicodeDecodeError):
            revision = None
    if revision is None or revision.startswith("-"):
        raise ConfigError(
            f"The git source {key!r} names no revision.",
            where=f"params.yaml: documents.sources.{key}, pin file {pin}",
            next=f"write a commit into {pin} (any file under data/sources, named as `path`), "
            "or give `revision`",
        )
    return revision


def _mirror(url: str, caches: Path) -> Path:
    """The bare mirror of a repository, cloned when it is not there."""
    if url.startswith("-") or "::" in url:
        raise ConfigError(
            f"{url!r} is not the address of a git repository.",
            where="params.yaml: documents.sources",
            next="give an address such as git+https://host/project.git",
        )
    mirror = caches / "git" / hashlib.sha256(url.encode()).hexdigest()[:16]
    with _locked(mirror):
        if not (mirror / "HEAD").is_file():
            part = Path(tempfile.mkdtemp(dir=mirror.parent, prefix="clone-"))
            try:
                _git("clone", "--quiet", "--bare", "--", url, str(part), url=url)
                shutil.rmtree(mirror, ignore_errors=True)
                part.replace(mirror)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return mirror


def _resolve(mirror: Path, url: str, revision: str) -> str:
    """The commit that a revision names; fetched unless it is an id that is there."""
    if not (COMMIT.fullmatch(revision) and _commit(mirror, revision)):
        refs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
        with _locked(mirror):
            where = ("-C", str(mirror))
            _git(*where, "fetch", "--quiet", "--prune", "--", url, *refs, url=url)
    commit = _commit(mirror, revision)
    if commit is None:
        raise InputError(
            f"The repository has no revision {revision!r}.",
            where=url,
            next="name a commit, a tag or a branch that it has",
        )
    return commit


def _commit(mirror: Path, revision: str) -> str | None:
    result = subprocess.run(
        [*_command(), "-C", str(mirror), "rev-parse", "--verify", "--quiet", "--end-of-options",
         f"{revision}^{{commit}}"],
        capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip
    return result.stdout.strip() or None


def _tree(mirror: Path, commit: str) -> dict[str, tuple[str, str, int]]:
    """Path -> (mode, blob, bytes) of every file of the commit, sorted by path."""
    listing = _git("-C", str(mirror), "ls-tree", "-r", "-z", "-l", "--full-tree", commit)
    found = {}
    for line in listing.split(b"\0"):
        if line:
            facts, _, path = line.partition(b"\t")
            mode, _, blob, count = facts.decode().split()
            found[os.fsdecode(path)] = (mode, blob, 0 if count == "-" else int(count))
    return dict(sorted(found.items()))


class _Blobs:
    """``git cat-file --batch``: one process for all blobs."""

    def __init__(self, mirror: Path) -> None:
        self._process = subprocess.Popen(
            [*_command(), "-C", str(mirror), "cat-file", "--batch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )

    def __enter__(self) -> _Blobs:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def read(self, blob: str) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(blob.encode() + b"\n")
        self._process.stdin.flush()
        header = self._process.stdout.readline().split()
        if len(header) != 3 or header[1] != b"blob":
            raise InputError(
                f"The mirror of a git source lacks the object {blob}.",
                next="delete the folder caches/git of the state folder and run again",
            )
        data = self._process.stdout.read(int(header[2]) + 1)
        return data[:-1]


@contextmanager
def _locked(mirror: Path) -> Iterator[None]:
    """One process at a time clones or fetches a mirror."""
    mirror.parent.mkdir(parents=True, exist_ok=True)
    with mirror.with_name(mirror.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _git(*arguments: str, url: str = "") -> bytes:
    """Standard output of a git command. Raises ServiceError with git's words."""
    result = subprocess.run(
        [*_command(), *arguments], capture_output=True, check=False, env=_environment()
    )
    if result.returncode:
        words = result.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ServiceError(
            f"git {next(item for item in arguments if item in COMMANDS)} failed: "
            + (" ".join(words)[:400] or f"exit code {result.returncode}"),
            where=url or "a mirror in the caches",
            next="check the address, the network and the credentials",
        )
    return result.stdout


COMMANDS = ("clone", "fetch", "ls-tree")


def _command() -> list[str]:
    git = shutil.which("git")
    if git is None:
        raise ConfigError("git is not installed.", next="install git: a source needs it")
    settings = (
        *("protocol.ext.allow=never", "core.hooksPath=/dev/null"),
        *("http.lowSpeedLimit=1000", "http.lowSpeedTime=60"),  # a stalled server is an error
    )
    return [git, *(part for item in settings for part in ("-c", item))]


def _environment() -> dict[str, str]:
    """Without the variables of a git hook that may be running us, and without prompts."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return {**kept, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
