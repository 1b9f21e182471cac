"""The one small tree of errors. Every message says what is wrong, where, and the next step.

``RatchetError(what, where=..., next=...)`` prints as one clear block. A process that meets one
ends with ``exit_code`` and without a traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class RatchetError(Exception):
    """Something a person can act on.

    Args:
        what: what is wrong, one sentence.
        where: the file, key, row or address it was seen at.
        next: the next step for the reader.
        offenders: every offender, when there are several: they are all listed, so that one fix
            cycle is enough.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        next: str | None = None,
        offenders: list[str] | None = None,
    ) -> None:
        self.what, self.where, self.next, self.offenders = what, where, next, offenders or []
        lines = [what]
        lines += [f"  - {offender}" for offender in self.offenders]
        if where:
            lines.append(f"  where: {where}")
        if next:
            lines.append(f"  next:  {next}")
        super().__init__("\n".join(lines))


class ConfigError(RatchetError):
    """params.yaml, the environment or a policy says something that cannot be."""

    exit_code = 2


class InputError(RatchetError):
    """Data that a stage was given is missing, unreadable or breaks its contract."""


class QualityError(RatchetError):
    """A blocking check over data failed."""


class GateError(RatchetError):
    """The gate did not say PASS: it said FAIL, unless this is one of the two below."""

    exit_code = 3


class UndecidedError(GateError):
    """The gate can show neither: more evidence is needed. Never a pass."""

    exit_code = 5


class InvalidError(GateError):
    """The gate's evidence is incomplete, or was made under another policy."""

    exit_code = 6


class ApprovalError(RatchetError):
    """A release waits for a named person."""

    exit_code = 7


class RefusedError(ApprovalError):
    """A named person said no."""

    exit_code = 8


class ServiceError(RatchetError):
    """A process or an address that this work needs does not answer."""


class NotFoundError(RatchetError):
    """A release, response or channel of that name does not exist."""


class ConflictError(RatchetError):
    """Somebody else was first. ``winner`` is what they wrote, where there is a record of it."""

    exit_code = 4

    def __init__(self, what: str, *, winner: object = None, next: str | None = None) -> None:
        self.winner = winner
        super().__init__(what, next=next)
