"""What can go wrong between DVC and Dagster, as one small tree.

Every message says what happened, where, and what to do next. Where several things are wrong at
once, one error lists all of them: one fix cycle, not five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DagsterDvcError(Exception):
    """The root of the tree: catch this to catch everything that this package raises."""


class ProjectNotFound(DagsterDvcError):
    """The folder is no DVC project: no ``dvc.yaml`` in it, or no ``.dvc`` in or above it."""


@dataclass(frozen=True)
class Offence:
    """One thing that is wrong in a ``dvc.yaml``.

    Args:
        where: ``dvc.yaml:12`` where the line is known, else the file.
        what: what is wrong, naming the stage.
        advice: one line that says what to change.
    """

    where: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n    -> {self.advice}"


class InvalidProject(DagsterDvcError):
    """``dvc.yaml`` cannot be shown as assets. Lists every offender at once.

    Args:
        offences: all that is wrong, in file order.
    """

    def __init__(self, offences: Sequence[Offence]) -> None:
        self.offences = tuple(offences)
        count = len(self.offences)
        head = f"{count} problem{'s' if count != 1 else ''} in the DVC project:"
        super().__init__("\n".join([head, *(f"  {offence}" for offence in self.offences)]))


class ResolveFailed(DagsterDvcError):
    """DVC itself could not load the project (broken YAML, unsupported DVC version …)."""


class CheckoutBusy(DagsterDvcError):
    """Another process holds the checkout and did not let go before the deadline."""


class InputsMissing(DagsterDvcError):
    """Files that the stage reads are neither in the workspace, nor the cache, nor a remote."""


class StageFailed(DagsterDvcError):
    """The stage's command (or DVC around it) failed.

    Args:
        message: what happened and what to do next.
        tail: the last lines of the log.
        exit_code: of the ``dvc`` process, where there was one.
        kept: where the files that the failed command left were moved to, if there were any.
    """

    def __init__(
        self,
        message: str,
        *,
        tail: Sequence[str] = (),
        exit_code: int | None = None,
        kept: str | None = None,
    ) -> None:
        super().__init__(message)
        self.tail = tuple(tail)
        self.exit_code = exit_code
        self.kept = kept
