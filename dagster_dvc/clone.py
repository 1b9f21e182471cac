"""``CloneRunner``: the stage runs in a checkout of its own and hands its result back through DVC.

In: a request. Out: the result in the project's checkout. This is the protocol that runners on
other machines (Kubernetes, Ray) follow; here both sides are on one machine, so that it can be
tested whole.

====== ======================================================================================
side   what
====== ======================================================================================
control push the inputs (``dvc push UPSTREAM…``); snapshot: git commit + uncommitted files
runner  check out the snapshot; ``dvc repro --pull --single-item X``; ``dvc push --run-cache X``;
        ``_dvc_internals.py push-uncached ROOT X`` (metrics that are not cached)
control ``dvc repro --pull --single-item X``: finds the run in the remote's run cache, restores it
====== ======================================================================================

The snapshot is the commit of ``HEAD`` plus every file that git calls changed or untracked (not
ignored), so that an edited ``params.yaml`` counts without a commit, as it does for ``dvc repro``;
``require_clean=True`` refuses that instead. The project's checkout is locked while inputs are
pushed and while the result is taken, not while the stage runs: clones work side by side.

The last step must never execute a heavy stage on the control side (somebody may have edited
``params.yaml`` meanwhile). DVC runs commands by ``$SHELL``; for that step it is a program that
refuses.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from .checkout import Checkout, Held, Patience
from .errors import DagsterDvcError, StageFailed
from .manifest import Manifest, ResolvedStage, internals_command
from .process import GRACE_S, Emit, dvc_command, run_supervised, stage_environment
from .project import DvcProject
from .runner import (
    RAN,
    RUN_CACHE,
    TAIL_LINES,
    StageRequest,
    StageResult,
    command_text,
    decision,
    reproduce,
)

_REFUSED = "[dagster_dvc] refused: this stage is not to be executed in this checkout"


class CannotTravel(DagsterDvcError):
    """The stage or project lacks what a run in another checkout needs; lists all of it."""


@dataclass(frozen=True)
class Snapshot:
    """What the runner works on: a commit, and the files that differ from it.

    Args:
        top: root of the git repository.
        commit: full hash of ``HEAD``.
        changed: paths from ``top`` to copy over the commit.
        deleted: paths from ``top`` to remove from it.
    """

    top: Path
    commit: str
    changed: tuple[str, ...]
    deleted: tuple[str, ...]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotTravel(
            f"`git {' '.join(arguments)}` failed in {folder}: {done.stderr.strip()}\n"
            "Next: CloneRunner needs a git repository with at least one commit."
        )
    return done.stdout


def snapshot(root: Path) -> Snapshot:
    """The state of the git repository around ``root``, uncommitted files included.

    Raises:
        CannotTravel: no git repository, or no commit in it.
    """
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    commit = _git(root, "rev-parse", "HEAD").strip()
    listed = _git(top, "status", "--porcelain=v1", "-z", "-uall", "--no-renames").split("\0")
    paths = sorted({entry[3:] for entry in listed if entry})
    there = [path for path in paths if (top / path).is_file() or (top / path).is_symlink()]
    return Snapshot(top, commit, tuple(there), tuple(set(paths) - set(there)))


def check_out(taken: Snapshot, target: Path) -> None:
    """Make a checkout of a snapshot. Git objects are shared, not copied.

    Raises:
        CannotTravel: git refuses.
    """
    _git(taken.top, "clone", "--quiet", "--shared", "--no-checkout", str(taken.top), str(target))
    _git(target, "checkout", "--quiet", "--detach", taken.commit)
    for path in taken.changed:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(taken.top / path, target / path, follow_symlinks=False)
    for path in taken.deleted:
        (target / path).unlink(missing_ok=True)


def write_config(project: DvcProject, manifest: Manifest, dvc_dir: Path) -> None:
    """Give a checkout the project's local DVC settings, its remote, and a cache of its own.

    Addresses in DVC's configuration may be relative to it: here they are made absolute.
    """
    config = configparser.RawConfigParser()
    config.read(project.dvc_dir / "config.local")
    settings: dict[str, Mapping[str, str]] = {"cache": {"dir": str(dvc_dir / "cache")}}
    if manifest.remote and manifest.remote["url"]:
        settings[f"'remote \"{manifest.remote['name']}\"'"] = {"url": manifest.remote["url"]}
    for section, values in settings.items():
        if not config.has_section(section):
            config.add_section(section)
        for name, value in values.items():
            config.set(section, name, value)
    with (dvc_dir / "config.local").open("w") as stream:
        config.write(stream)


def obstacles(manifest: Manifest, node: ResolvedStage) -> list[str]:
    """Why a stage cannot run in another checkout; [] if it can.

    The result travels as an entry of the run cache, and DVC makes none for some stages.
    """
    found = []
    if not manifest.remote:
        found.append("the project has no default remote: `dvc remote add -d NAME URL`")
    if node.always_changed or not node.deps or not node.outs:
        found.append("it has no dependencies or no outputs, or is `always_changed`")
    found += [f"its dependency {dep.path} is not a file" for dep in node.deps if not dep.local]
    for out in node.outs:
        if out.persist or not out.local:
            found.append(f"its output {out.path} is `persist` or outside of the checkout")
        elif not out.cache and not out.metric and not out.plot:
            found.append(f"its output {out.path} is not cached and neither metric nor plot")
    return found


class CloneRunner:
    """Runs each stage in a fresh checkout of its own; several run side by side.

    Args:
        patience: how long to wait for the project's checkout.
        folder: where checkouts are made; by default under ``.dvc/tmp/dagster_dvc/clones``.
        require_clean: refuse to run while git has uncommitted files.
        env: added to the environment of every stage.
        grace_s: seconds between SIGTERM and SIGKILL when a stage is cancelled.
    """

    name = "clone"

    def __init__(
        self,
        patience: Patience | None = None,
        *,
        folder: Path | None = None,
        require_clean: bool = False,
        env: Mapping[str, str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.patience = patience or Patience()
        self.folder = folder
        self.require_clean = require_clean
        self.env = dict(env or {})
        self.grace_s = grace_s

    def run(self, request: StageRequest) -> StageResult:
        """Run the stage in a checkout of its own. See ``StageRunner.run``.

        Raises:
            CannotTravel: the stage or the project lacks what this runner needs.
        """
        asked = time.monotonic()
        manifest = request.project.manifest()
        self._check(manifest, request)
        checkout = Checkout(request.project, self.patience)
        folder = self.folder or request.project.work_dir / "clones"
        folder.mkdir(parents=True, exist_ok=True)
        clone = Path(mkdtemp(prefix=f"{request.node.name}-", dir=folder)) / "checkout"
        try:
            with checkout.exclusive(request.node.name, request.emit) as held:
                started = time.monotonic()
                done = self._already(held, request)
                if done is not None:
                    return StageResult(done, time.monotonic() - started, started - asked)
                self._push_inputs(held, request)
                taken = snapshot(request.project.root)
                check_out(taken, clone)
                self._copy_uncached_inputs(request, clone / manifest.root.relative_to(taken.top))
            how = self._run_in(clone, taken, manifest, request)
            with checkout.exclusive(request.node.name, request.emit) as held:
                self._take(held, request)
            details = {"git_commit": taken.commit, "uncommitted": len(taken.changed)}
            return StageResult(how, time.monotonic() - started, started - asked, details)
        finally:
            shutil.rmtree(clone.parent, ignore_errors=True)

    # -- control side, before ------------------------------------------------------------------

    def _check(self, manifest: Manifest, request: StageRequest) -> None:
        found = obstacles(manifest, request.node)
        if self.require_clean:
            taken = snapshot(request.project.root)
            found += [f"{path} is not committed" for path in (*taken.changed, *taken.deleted)]
        if found:
            raise CannotTravel(
                f"stage {request.node.name!r} cannot run in a checkout of its own:\n"
                + "\n".join(f"  {reason}" for reason in found)
                + "\nNext: correct that, or use LocalRunner for this stage."
            )

    def _guard(self, project: DvcProject) -> dict[str, str]:
        """An environment in which DVC can restore, but not execute."""
        path = project.work_dir / "refuse"
        path.write_text(f"#!/bin/sh\necho '{_REFUSED}' >&2\nexit 97\n")
        path.chmod(0o755)
        return {"SHELL": str(path)}

    def _already(self, held: Held, request: StageRequest) -> str | None:
        """How the project's checkout already has the result, None where it has to be made."""
        project, node = request.project, request.node
        if not project.state().verdict(node).fresh:
            return None
        try:
            finished = reproduce(held, request, env=self._guard(project))
        except StageFailed:
            return None
        return decision(node.name, finished.lines)

    def _push_inputs(self, held: Held, request: StageRequest) -> None:
        held.fetch_inputs(request.node)
        state = request.project.state()
        targets = {one.name for dep in request.node.deps for one, _ in state.producers(dep)}
        for dep in request.node.deps:
            if dep.local and (request.project.root / f"{dep.path}.dvc").is_file():
                targets.add(f"{dep.path}.dvc")
        if targets:
            done = held.dvc("push", *sorted(targets))
            if done.code != 0:
                raise StageFailed(
                    f"the inputs of {request.node.name!r} could not be pushed to the remote. "
                    "Next: `dvc push` shows the same error.",
                    tail=done.lines[-TAIL_LINES:],
                    exit_code=done.code,
                )

    @staticmethod
    def _copy_uncached_inputs(request: StageRequest, root: Path) -> None:
        """Metrics that the stage reads are in no cache, and may be ignored by git."""
        state = request.project.state()
        for dep in request.node.deps:
            source = request.project.root / dep.path
            uncached = any(not out.cache for _, out in state.producers(dep))
            if uncached and source.is_file():
                (root / dep.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, root / dep.path)

    # -- runner side ---------------------------------------------------------------------------

    def _run_in(
        self, clone: Path, taken: Snapshot, manifest: Manifest, request: StageRequest
    ) -> str:
        """Run the stage in its checkout and push the result; how DVC satisfied it there."""
        node = request.node
        root = clone / manifest.root.relative_to(taken.top)
        write_config(request.project, manifest, clone / manifest.dvc_dir.relative_to(taken.top))
        said: list[str] = []

        def emit(line: str) -> None:
            said.append(line)
            request.emit(line)

        def run(command: list[str], say: Emit = emit) -> int:
            return run_supervised(
                command,
                cwd=root,
                env=stage_environment({**self.env, **request.env}),
                emit=say,
                grace_s=self.grace_s,
            )

        code = run(dvc_command("repro", "--pull", "--single-item", node.name))
        if code != 0:
            kept = self._keep(root, request)
            raise StageFailed(
                _failed(request, said, code, kept),
                tail=said[-TAIL_LINES:],
                exit_code=code,
                kept=kept,
            )
        how = decision(node.name, said) or RUN_CACHE
        code = run(dvc_command("push", "--run-cache", node.name))
        if code == 0 and any(not out.cache for out in node.outs):
            code = run(internals_command("push-uncached", str(root), node.name), said.append)
        if code != 0:
            raise StageFailed(
                f"stage {node.name!r} ran, but its result could not be pushed to the remote "
                f"{(manifest.remote or {}).get('url')}. Next: look at the remote, then materialize "
                "again.",
                tail=said[-TAIL_LINES:],
                exit_code=code,
            )
        return how

    def _keep(self, root: Path, request: StageRequest) -> str | None:
        """Keep what a failed command wrote in its checkout, which goes away."""
        kept = request.project.work_dir / "failed" / request.node.name
        shutil.rmtree(kept, ignore_errors=True)
        for out in request.node.outs:
            if out.local and (root / out.path).exists():
                (kept / out.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(str(root / out.path), str(kept / out.path))
        if not kept.exists():
            return None
        return str(kept.relative_to(request.project.dvc_dir.parent))

    # -- control side, after -------------------------------------------------------------------

    def _take(self, held: Held, request: StageRequest) -> None:
        try:
            reproduce(held, request, ["--pull"], env=self._guard(request.project))
        except StageFailed as error:
            if not any(_REFUSED in line for line in error.tail):
                raise
            raise StageFailed(
                f"stage {request.node.name!r} ran in its own checkout, but its result does not fit "
                "this one: its inputs, parameters or code changed here meanwhile. The result is in "
                "the remote's run cache and nothing here was changed. Next: materialize again.",
                tail=error.tail,
                exit_code=error.exit_code,
            ) from error


def _failed(request: StageRequest, said: list[str], code: int, kept: str | None) -> str:
    ran = decision(request.node.name, said) == RAN
    return "\n".join(
        [
            f"stage {request.node.name!r}: "
            + ("its command failed" if ran else "DVC could not run it")
            + f" in a checkout of its own (dvc exit status {code}).",
            f"Command: {command_text(request.node.cmd)}",
            f"Last {min(len(said), TAIL_LINES)} lines:",
            *(f"  {line}" for line in said[-TAIL_LINES:]),
            "Next:",
            *([f"  - look at what it wrote: {kept}"] if kept else []),
            f"  - dvc repro --single-item {request.node.name}   (in {request.project.root})",
            "  - nothing is lost: this checkout was not touched",
        ]
    )
