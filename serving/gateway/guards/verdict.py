"""What guards say: findings by kind, place and rule version, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from serving.gateway.envelope import ApiError
from serving.gateway.guards.policy import Guard

Side = Literal["input", "passages", "output"]
#: From mildest to strictest.
Outcome = Literal["allow", "flag", "redact", "block"]
_RANK: dict[Outcome, int] = {"allow": 0, "flag": 1, "redact": 2, "block": 3}
#: Findings of one verdict that are kept; the others are counted.
KEPT = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """Never the text itself. ``start`` and ``end`` count characters of the original text at
    ``where``, for example ``messages.2.content``; of output, characters of the answer."""

    guard: str
    kind: str
    where: str
    start: int
    end: int
    version: str  # of the rules
    action: str  # what the policy wants done
    enforced: bool  # whether it was done

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Verdict:
    """``error`` is what the request ends with when ``action`` is block; ``text`` the answer as it
    may go out (output only)."""

    side: Side
    action: Outcome = "allow"
    findings: list[Finding] = field(default_factory=list)
    more: int = 0  # findings that were not kept
    failures: list[str] = field(default_factory=list)  # "pii: timeout, open"
    error: ApiError | None = None
    text: str = ""

    def add(self, finding: Finding, guard: Guard) -> None:
        if len(self.findings) < KEPT:
            self.findings.append(finding)
        else:
            self.more += 1
        self.at_least(guard.action if guard.enforced else "flag")

    def at_least(self, action: Outcome) -> None:
        if _RANK[action] > _RANK[self.action]:
            self.action = action

    def block(self, code: str, message: str, param: str | None = None) -> None:
        self.action = "block"
        self.error = self.error or ApiError(code, message, param)

    def record(self) -> dict[str, Any]:
        """For the audit log; {} when there is nothing to tell."""
        if not self.findings and not self.failures:
            return {}
        return {
            "side": self.side,
            "action": self.action,
            "findings": [finding.record() for finding in self.findings],
            "more": self.more,
            "failures": self.failures,
        }


class Placeholders:
    """``[EMAIL_1]``: the same value has the same number throughout one request or answer."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._last: dict[str, int] = {}

    def __call__(self, kind: str, value: str) -> str:
        number = self._numbers.get((kind, value))
        if number is None:
            number = self._numbers[kind, value] = self._last.get(kind, 0) + 1
            self._last[kind] = number
        return f"[{kind.upper()}_{number}]"
