"""Build a release again from nothing but git and DVC, and say whether it is the same.

The commit whose dvc.lock names the release's bytes is cloned into a temporary folder, its data is
pulled (from this checkout's cache, then from the remotes that are configured), and ``dvc repro``
must find nothing to do. Then every member is hashed there. Nothing of the checkout is touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contracts.digests import file_md5, path_md5
from contracts.errors import InputError, NotFoundError, RatchetError, ServiceError
from contracts.records import Release
from contracts.settings import Settings
from resources.releases import read_release

#: What a clone must not inherit: it has folders of its own.
_OWN = ("RATCHET_ROOT", "RATCHET_STATE_DIR", "DAGSTER_HOME")


@dataclass(frozen=True)
class Reproduced:
    """What came of it."""

    release: str  # the id that was asked for
    commit: str  # whose dvc.lock names it
    found: str | None  # the id in the fresh checkout
    stale: list[str]  # stages that `dvc status` would run again
    wrong: list[str]  # members whose bytes are not what the release names

    @property
    def same(self) -> bool:
        return self.found == self.release and not self.stale and not self.wrong


def reproduce(
    release_json: Path, settings: Settings, say: Callable[[str], None] = lambda line: None
) -> Reproduced:
    """See the module.

    Args:
        release_json: the release file, of this checkout or an installed one.

    Raises:
        NotFoundError: no commit's dvc.lock names that file.
        ServiceError: git or DVC failed, for example because a file is on no remote.
    """
    release = read_release(release_json)
    commit = commit_of(file_md5(release_json), settings.root)
    say(f"release {release.id}: its lock file is at commit {commit[:12]}")
    with _checkout(settings.root, commit) as (root, run):
        say("pulling its data")
        _pull(root, settings.root, run)
        say("asking DVC what it would run")
        status = run("dvc", "status", "--json", "--with-deps", "release")
        stale = sorted(json.loads(status.splitlines()[-1]))
        if not stale:
            run("dvc", "repro", "release")  # the proof: it finds nothing to do
        say("hashing every member")
        return Reproduced(release.id, commit, _id(root), stale, different(release, root))


def commit_of(md5: str, root: Path) -> str:
    """The newest commit whose dvc.lock holds ``md5``. Raises NotFoundError."""
    log = ["git", "log", "--format=%H", f"-S{md5}", "--", "dvc.lock"]
    for commit in _git(root, log).split():  # commits that brought it, or took it away
        if md5 in _git(root, ["git", "show", f"{commit}:dvc.lock"]):
            return commit
    raise NotFoundError(
        "No commit's dvc.lock names this release file.",
        where=str(root),
        next="commit dvc.lock after `dvc repro`; only what is in git can be built again",
    )


def different(release: Release, root: Path) -> list[str]:
    """Members that are missing under ``root`` or have another digest there."""
    wrong = []
    for name, member in release.members.items():
        path = root / member.path
        if not path.exists():
            wrong.append(f"{name} ({member.path}): missing")
        elif (digest := path_md5(path)) != member.md5:
            wrong.append(f"{name} ({member.path}): {digest}, the release names {member.md5}")
    return wrong


def _id(root: Path) -> str | None:
    try:
        return read_release(root / "data" / "release.json").id
    except RatchetError:
        return None


@contextmanager
def _checkout(root: Path, commit: str) -> Iterator[tuple[Path, Callable[..., str]]]:
    """A clone at ``commit``, and what runs a command in it."""
    with tempfile.TemporaryDirectory(prefix="ratchet-reproduce-") as folder:
        clone = Path(folder) / "checkout"
        _git(root, ["git", "clone", "-q", "--no-checkout", str(root), str(clone)])
        _git(clone, ["git", "checkout", "-q", commit])
        env = {name: value for name, value in os.environ.items() if name not in _OWN}
        env |= {"RATCHET_TRACKING": "off", "DVC_NO_ANALYTICS": "1"}

        def run(*command: str, check: bool = True) -> str:
            result = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=clone,
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            if check and result.returncode:
                raise ServiceError(
                    f"`{' '.join(command)}` failed in the fresh checkout.",
                    where=f"commit {commit[:12]}",
                    next=(result.stderr or result.stdout).strip()[-2000:],
                )
            return result.stdout

        yield clone, run


def _pull(clone: Path, root: Path, run: Callable[..., str]) -> None:
    """What this machine has comes from its cache, the rest from the remotes of the commit, with
    the addresses that this checkout has for them."""
    local = root / ".dvc" / "config.local"
    if local.is_file():
        (clone / ".dvc" / "config.local").write_bytes(local.read_bytes())
    cache = Path(
        subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    run("dvc", "remote", "add", "--local", "--force", "reproduce-cache", str(cache))
    run("dvc", "pull", "--remote", "reproduce-cache", "--allow-missing", check=False)
    run("dvc", "remote", "remove", "--local", "reproduce-cache")
    missing = json.loads(run("dvc", "data", "status", "--json").splitlines()[-1])
    if missing.get("not_in_cache"):
        run("dvc", "pull")


def _git(cwd: Path, command: list[str]) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(
            f"`{' '.join(command[:2])}` failed: {result.stderr.strip()}",
            where=str(cwd),
            next="a release is built again from a git checkout that has its commit",
        )
    return result.stdout
