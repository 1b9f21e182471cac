"""Where a stage's process runs: the small interface, and the runner for this machine.

In: ``StageRequest`` (which stage, with what environment). Out: ``StageResult`` (how DVC satisfied
it), and every line of the log on the way. Assets know only ``StageRunner``; a stage never knows
where it runs. ``clone.py`` has the runner whose protocol remote ones follow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .checkout import Checkout, Finished, Held, Patience
from .errors import CheckoutBusy, StageFailed
from .manifest import ResolvedStage
from .process import GRACE_S, Emit
from .project import DvcProject

TAIL_LINES = 40

RAN, RUN_CACHE, UNCHANGED, PULLED = "ran", "run_cache", "unchanged", "pulled"


@dataclass(frozen=True)
class StageRequest:
    """One stage to run.

    Args:
        project: the checkout whose lock and outputs are to be brought up to date.
        node: the resolved stage.
        emit: gets every line of the log as it comes.
        env: added to the environment of the stage's process.
    """

    project: DvcProject
    node: ResolvedStage
    emit: Emit
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """How DVC satisfied a request.

    Args:
        how: ``ran`` (the command was executed), ``run_cache`` (an earlier run's result was
            checked out), ``unchanged`` (nothing to do) or ``pulled`` (fetched from the remote).
        seconds: wall time of it all, waiting for the checkout apart.
        waited: seconds spent waiting for the checkout.
        details: shown as metadata (``dvc/<name>``).
    """

    how: str
    seconds: float
    waited: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class StageRunner(Protocol):
    """Runs one stage somewhere and leaves its result in the project's checkout.

    When ``run`` returns, the project's ``dvc.lock`` has the stage's entry and its outputs are in
    the workspace. When it raises, the last good outputs are. An exception that interrupts it
    (cancelling) must end the stage's processes, wherever they are.
    """

    @property
    def name(self) -> str:
        """Short, for metadata: ``local``, ``clone``, ``k8s`` …"""
        ...

    def run(self, request: StageRequest) -> StageResult:
        """Run the stage to its end.

        Raises:
            StageFailed: the command failed; the message says what to do next.
            CheckoutBusy: the checkout was not free before the deadline.
            InputsMissing: inputs can be had from nowhere.
        """
        ...


def decision(stage: str, lines: Sequence[str]) -> str | None:
    """What DVC decided to do with a stage, by its own words; None where it never got there.

    DVC prints its decision before the stage's command runs, so the first match counts and a
    stage's log cannot be taken for it. "Pulling" may be followed by another decision when the
    remote lacks the data.
    """
    name = re.escape(stage)
    words = (
        (re.compile(rf"^Stage '{name}' didn't change, skipping"), UNCHANGED),
        (re.compile(rf"^Stage '{name}' is cached - skipping run"), RUN_CACHE),
        (re.compile(rf"^Running stage '{name}':"), RAN),
    )
    pulling = False
    for line in lines:
        pulling = pulling or line.startswith(f"Pulling data for stage: '{stage}'")
        for pattern, how in words:
            if pattern.match(line):
                return how
    return PULLED if pulling else None


def command_text(cmd: str | Sequence[str]) -> str:
    """A stage's command for people: several commands become several lines."""
    return cmd if isinstance(cmd, str) else "\n".join(cmd)


class LocalRunner:
    """Runs stages as processes of this machine, in the project's checkout, one at a time.

    Args:
        patience: how long to wait for the checkout and for DVC's own locks.
        pull: pass ``--pull``: results that colleagues pushed are fetched instead of made. Reads
            the remote's whole run cache each time, hence off unless asked for.
        env: added to the environment of every stage.
        grace_s: seconds between SIGTERM and SIGKILL when a stage is cancelled.
    """

    name = "local"

    def __init__(
        self,
        patience: Patience | None = None,
        *,
        pull: bool = False,
        env: Mapping[str, str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.patience = patience or Patience()
        self.env = dict(env or {})
        self.pull = pull
        self.grace_s = grace_s

    def run(self, request: StageRequest) -> StageResult:
        """Run the stage in the checkout. See ``StageRunner.run``."""
        asked = time.monotonic()
        checkout = Checkout(request.project, self.patience)
        with checkout.exclusive(request.node.name, request.emit) as held:
            started = time.monotonic()
            fetched = held.fetch_inputs(request.node)
            arguments = ["--pull"] if self.pull and request.project.manifest().remote else []
            finished = reproduce(held, request, arguments, env=self.env, grace_s=self.grace_s)
            how = decision(request.node.name, finished.lines) or UNCHANGED
            if how in (RUN_CACHE, PULLED) and held.drop_damaged(request.node.name):
                # Forced: DVC believes that it has just restored the stage.
                again = ["--force", "--no-run-cache"]
                finished = reproduce(held, request, again, env=self.env, grace_s=self.grace_s)
                how = RAN
            return StageResult(
                how=how,
                seconds=time.monotonic() - started,
                waited=started - asked,
                details={"fetched_inputs": fetched} if fetched else {},
            )


def reproduce(
    held: Held,
    request: StageRequest,
    arguments: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> Finished:
    """``dvc repro --single-item`` in a held checkout; on failure the last good output is put back.

    Raises:
        StageFailed: DVC or the command failed.
        BaseException: whatever interrupted it, after the outputs are back in place.
    """
    node = request.node
    copied = held.begin(node)
    outs = [out.path for out in node.outs if out.local]
    said: list[str] = []

    def emit(line: str) -> None:
        said.append(line)
        request.emit(line)

    def put_back() -> str | None:
        # Where the command never started, what lies there is not its work.
        keep = outs if decision(node.name, said) == RAN else []
        kept = held.put_back(node.name, keep, copied)
        held.end()
        return kept

    try:
        finished = held.dvc(
            "repro",
            "--single-item",
            *arguments,
            node.name,
            env={**(env or {}), **request.env},
            emit=emit,
            grace_s=grace_s,
        )
    except CheckoutBusy:  # DVC touched nothing
        held.end()
        raise
    except BaseException:
        put_back()
        raise
    if finished.code == 0:
        held.end()
        return finished
    kept = put_back()
    raise StageFailed(
        failure_message(request, finished, kept),
        tail=said[-TAIL_LINES:],
        exit_code=finished.code,
        kept=kept,
    )


def failure_message(request: StageRequest, finished: Finished, kept: str | None) -> str:
    """What failed, its last words, and what to do next."""
    node = request.node
    ran = decision(node.name, finished.lines) == RAN
    what = "its command failed" if ran else "DVC could not run it"
    tail = [line for line in finished.lines if line.strip()][-TAIL_LINES:]
    had_output = node.name in request.project.lock()
    steps = [f"dvc repro --single-item {node.name}   (in {request.project.root}, shows it again)"]
    if kept:
        steps.insert(0, f"look at what it wrote: {kept}")
    if had_output:
        steps.append("nothing is lost: the last good output is in place again")
    return "\n".join(
        [
            f"stage {node.name!r}: {what} (dvc exit status {finished.code}).",
            f"Command: {command_text(node.cmd)}",
            f"Last {len(tail)} lines:",
            *(f"  {line}" for line in tail),
            "Next:",
            *(f"  - {step}" for step in steps),
        ]
    )
