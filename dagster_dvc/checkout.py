"""One checkout, one stage at a time: the lock, DVC's calls, and putting things back.

In: a project. Out: ``Checkout``, whose ``exclusive`` block is the only place where DVC writes to
the checkout. Why each part is needed (DVC 3.67, measured):

* DVC does not wait: a related stage answers "busy", more than about six at once hit its 3 s
  repository lock. So there is one inter-process lock per checkout here, which waits; and "busy"
  caused by somebody's terminal is retried with backoff until a deadline.
* DVC deletes a stage's old outputs before its command runs. So a failed stage's last good output
  is checked out again, and what the failed command wrote is kept under ``failed/``.
* A process can die at any moment. So what is under way is written down first (``running.json``,
  a copy of ``dvc.lock`` and of outputs that DVC does not cache); whoever takes the lock next
  finds it, ends what still runs, and puts everything back. Nothing is left to a human.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import repair
from .errors import CheckoutBusy, InputsMissing
from .lockfile import LockUnreadable
from .manifest import ResolvedStage
from .process import Emit, dvc_command, run_supervised, stage_environment
from .project import DvcProject

_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
_SIDE_COPY_LIMIT = 64 << 20  # bytes of uncached outputs that are copied before a run


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds.

    Args:
        lock: for other materializations of this checkout (they may train a model: hours).
        busy: for DVC's own locks, held by somebody's terminal.
        progress: between two messages that say who is being waited for.
    """

    lock: float = 6 * 3600.0
    busy: float = 600.0
    progress: float = 30.0


@dataclass(frozen=True)
class Finished:
    """One ended ``dvc`` process: its exit status and all that it said."""

    code: int
    lines: tuple[str, ...]


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder, replacing what is there."""
    _remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Checkout:
    """The checkout of a project, for whoever wants to change it.

    Args:
        project: whose checkout.
        patience: how long to wait for what.
    """

    def __init__(self, project: DvcProject, patience: Patience | None = None) -> None:
        self.project = project
        self.patience = patience or Patience()
        self._dir = project.work_dir
        self._running = self._dir / "running.json"
        self._safe = self._dir / "safe"  # copies made before the run under way

    # -- the lock ------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self, stage: str, emit: Emit) -> Iterator[Held]:
        """Hold the checkout; whoever else wants it waits.

        The lock is an flock: the kernel drops it when the last process that holds it dies. On
        entry everything that an earlier, killed holder left is put right.

        Args:
            stage: who holds it, shown to those who wait.
            emit: gets progress messages.

        Raises:
            CheckoutBusy: ``patience.lock`` seconds passed.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._wait(descriptor, stage, emit)
            os.ftruncate(descriptor, 0)
            who = {"pid": os.getpid(), "stage": stage, "since": time.time()}
            os.pwrite(descriptor, json.dumps(who).encode(), 0)
            held = Held(self, descriptor, emit)
            held.recover()
            yield held
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int, stage: str, emit: Emit) -> None:
        started = told = time.monotonic()
        pause = 0.02
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                now = time.monotonic()
            if now - started > self.patience.lock:
                raise CheckoutBusy(
                    f"{stage}: {self.project.root} is held by {self._holder(descriptor)} and was "
                    f"not released within {self.patience.lock:.0f} s. Next: look at that process "
                    "(ending it releases the lock), or raise Patience.lock."
                )
            if now - told >= self.patience.progress or told == started:
                told = now + 1e-6
                emit(f"[dagster_dvc] {stage} waits for {self._holder(descriptor)}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    @staticmethod
    def _holder(descriptor: int) -> str:
        try:
            who = json.loads(os.pread(descriptor, 4096, 0))
            for_s = time.time() - float(who["since"])
            return f"stage {who['stage']!r} (PID {who['pid']}, for {for_s:.0f} s)"
        except (ValueError, KeyError, TypeError):
            return "another process"


class Held:
    """A checkout that this process holds: the calls that may change it.

    Made by ``Checkout.exclusive``, and valid inside its block only.
    """

    def __init__(self, checkout: Checkout, descriptor: int, emit: Emit) -> None:
        self.checkout = checkout
        self.project = checkout.project
        self._descriptor = descriptor
        self._emit = emit
        self._token = uuid4().hex

    # -- DVC -----------------------------------------------------------------------------------

    def dvc(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        emit: Emit | None = None,
        grace_s: float = 5.0,
    ) -> Finished:
        """Run ``dvc ARGUMENTS`` in the checkout; wait while a terminal keeps it busy.

        Raises:
            CheckoutBusy: still busy after ``patience.busy`` seconds.
        """
        deadline = time.monotonic() + self.checkout.patience.busy
        pause = 0.5
        while True:
            finished = self._dvc_once(arguments, env or {}, emit or self._emit, grace_s)
            busy = next((line for line in finished.lines if _BUSY.search(line)), None)
            if finished.code == 0 or busy is None:
                return finished
            if time.monotonic() > deadline:
                raise CheckoutBusy(
                    f"`dvc {' '.join(arguments)}` found {self.project.root} busy for "
                    f"{self.checkout.patience.busy:.0f} s. DVC says:\n"
                    + "\n".join(finished.lines[-6:])
                    + "\nNext: let the other `dvc` finish, then materialize again."
                )
            repair.drop_dead_entries(self.project.dvc_dir)
            self._emit(f"[dagster_dvc] DVC is busy ({busy.strip()}); again in {pause:.1f} s")
            time.sleep(pause)
            pause = min(pause * 1.6, 15.0)

    def _dvc_once(
        self, arguments: Sequence[str], env: Mapping[str, str], emit: Emit, grace_s: float
    ) -> Finished:
        lines: list[str] = []

        def take(line: str) -> None:
            lines.append(line)
            emit(line)

        code = run_supervised(
            dvc_command(*arguments),
            cwd=self.project.root,
            env=stage_environment({**env, repair.TOKEN: self._token}),
            emit=take,
            grace_s=grace_s,
            keep_open=[self._descriptor],
        )
        return Finished(code, tuple(lines))

    # -- inputs --------------------------------------------------------------------------------

    def fetch_inputs(self, node: ResolvedStage) -> list[str]:
        """Put missing inputs of a stage into the workspace: from the cache, else the remote.

        Returns:
            The paths that were missing and are there now.

        Raises:
            InputsMissing: all that could not be had, each with what to do about it.
        """
        missing = [dep for dep in node.deps if dep.local and not self._there(dep.path)]
        if not missing:
            return []
        state = self.project.state()
        targets: dict[str, str] = {}  # what to ask DVC for → the path that wants it
        for dep in missing:
            makers = [one.name for one, _ in state.producers(dep) if one.name in state.lock]
            if (self.project.root / f"{dep.path}.dvc").is_file():
                makers.append(f"{dep.path}.dvc")
            targets.update(dict.fromkeys(makers, dep.path))
        if targets:
            for name in targets:
                self.drop_damaged(name)
            self.dvc("checkout", *targets)
            wanted = [name for name, path in targets.items() if not self._there(path)]
            if wanted and state.manifest.remote:
                self.dvc("pull", *wanted)
        left = [dep for dep in missing if not self._there(dep.path)]
        if left:
            raise InputsMissing(self._missing_message(node, left, state, targets))
        return [dep.path for dep in missing]

    def _there(self, path: str) -> bool:
        return (self.project.root / path).exists()

    @staticmethod
    def _missing_message(
        node: ResolvedStage, left: Sequence[Any], state: Any, targets: Mapping[str, str]
    ) -> str:
        lines = [f"stage {node.name!r} cannot run: {len(left)} of its inputs are missing."]
        for dep in left:
            makers = ", ".join(one.name for one, _ in state.producers(dep))
            if dep.path in targets.values():
                where = "cache or remote" if state.manifest.remote else "cache (no remote is set)"
                advice = f"recorded, but not in the {where}: materialize {makers or 'it'} again"
            elif makers:
                advice = f"materialize {makers} first; it never ran here"
            else:
                advice = "no stage makes it: add the file, or correct the path in dvc.yaml"
            lines.append(f"  {dep.path}: {advice}")
        return "\n".join(lines)

    def drop_damaged(self, stage: str) -> bool:
        """Whether the cache held damaged bytes of a stage's output; they are gone from it then."""
        locked = self._lock_or_empty().get(stage)
        cache = self.project.manifest().cache
        dropped = repair.drop_damaged_objects(
            cache, [file.md5 for file in locked.outs.values()] if locked else []
        )
        if dropped:
            self._emit(
                f"[dagster_dvc] {len(dropped)} cached objects of {stage} were damaged and are "
                f"removed: {', '.join(dropped[:5])}"
            )
        return bool(dropped)

    # -- before, after, and in place of a run --------------------------------------------------

    def begin(self, node: ResolvedStage) -> list[str]:
        """Write down that a stage is about to run, with copies of what DVC cannot bring back.

        Returns:
            The outputs that were copied (for ``put_back``).
        """
        safe = self.checkout._safe
        _remove(safe)
        safe.mkdir(parents=True)
        lock = self.project.root / "dvc.lock"
        if lock.is_file():
            shutil.copy2(lock, safe / "dvc.lock")
        copied = []
        for out in node.outs:
            path = self.project.root / out.path
            if out.local and not out.cache and path.exists() and _bytes(path) <= _SIDE_COPY_LIMIT:
                _copy(path, safe / "outs" / out.path)
                copied.append(out.path)
        marker = {
            "stage": node.name,
            "token": self._token,
            "outs": [out.path for out in node.outs if out.local],
            "copied": copied,
            "root": os.path.relpath(self.project.root, self.project.dvc_dir.parent),
        }
        draft = self.checkout._running.with_suffix(".draft")
        draft.write_text(json.dumps(marker))
        draft.replace(self.checkout._running)
        return copied

    def end(self) -> None:
        """The stage is done, or everything has been put back."""
        self.checkout._running.unlink(missing_ok=True)
        _remove(self.checkout._safe)

    def put_back(self, stage: str, outs: Sequence[str], copied: Sequence[str]) -> str | None:
        """Bring back a stage's last good outputs; keep what the failed command wrote.

        Returns:
            The folder that holds what the failed command wrote, None where it wrote nothing.
        """
        kept = self.checkout._dir / "failed" / stage
        _remove(kept)
        left = [name for name in outs if self._there(name)]
        for name in left:
            target = kept / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(str(self.project.root / name), str(target))
        locked = stage in self._lock_or_empty()
        if locked:
            done = self.dvc("checkout", "--force", stage, emit=lambda line: None)
            if done.code != 0:
                self._emit(
                    f"[dagster_dvc] the last good output of {stage} is not in the cache and could "
                    f"not be restored: {done.lines[-1] if done.lines else ''}"
                )
        for name in copied:
            _copy(self.checkout._safe / "outs" / name, self.project.root / name)
        return str(kept.relative_to(self.project.dvc_dir.parent)) if left else None

    def _lock_or_empty(self) -> Mapping[str, Any]:
        try:
            return self.project.lock()
        except LockUnreadable:
            return {}

    # -- after somebody else's death -----------------------------------------------------------

    def recover(self) -> None:
        """Put right what a killed holder left behind; nothing to do in the ordinary case."""
        if repair.remove_damaged_table(self.project.dvc_dir):
            self._emit("[dagster_dvc] removed a damaged .dvc/tmp/rwlock")
        try:
            marker = json.loads(self.checkout._running.read_text())
        except FileNotFoundError:
            return
        except ValueError:
            marker = {}
        root = self.project.dvc_dir.parent / str(marker.get("root", "gone"))
        if not (root / "dvc.yaml").is_file():
            self.end()
            return
        if root.resolve() != self.project.root:  # another dvc.yaml under the same .dvc
            other = Checkout(DvcProject(root), self.checkout.patience)
            Held(other, self._descriptor, self._emit).recover()
            return
        stage = str(marker["stage"])
        self._emit(f"[dagster_dvc] an earlier run of {stage} was killed; putting it right")
        repair.end_processes(str(marker["token"]))
        repair.drop_dead_entries(self.project.dvc_dir)
        safe_lock = self.checkout._safe / "dvc.lock"
        try:
            self.project.lock()
        except LockUnreadable:
            if safe_lock.is_file():
                shutil.copy2(safe_lock, self.project.root / "dvc.lock")
        self.put_back(stage, marker["outs"], marker["copied"])
        self.end()
