"""The output guards of one answer, while it arrives: text in, text that may go out.

The system prompt and canaries are looked for first, personal data and secrets after them. Each
holds back what may still become a finding (patterns.py, leak.py); whether an answer came in one
piece or letter by letter, what goes out is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from serving.gateway.guards.patterns import Piece
from serving.gateway.guards.policy import Guard
from serving.gateway.guards.verdict import Finding, Placeholders, Verdict


class Window(Protocol):
    """A recogniser of streams; pieces together are the text that was fed."""

    @property
    def held(self) -> int: ...
    def feed(self, text: str) -> list[Piece]: ...
    def close(self) -> list[Piece]: ...


class Rules(dict[str, tuple[str, Guard, str]]):
    """Kind of finding -> (name of the guard, the guard, version of its rules)."""


class StreamGuard:
    """``feed`` and ``close`` give what may go out and raise ApiError (output_blocked).

    ``changes`` is False where every guard only looks: then what was fed is what comes back, at
    once, and the engine's bytes can be relayed as they are.
    """

    def __init__(self, windows: Sequence[Window], rules: Rules) -> None:
        self._windows, self._rules = windows, rules
        self._names = Placeholders()
        self._places = [0] * len(windows)
        self.changes = any(guard.enforced for _, guard, _ in rules.values())
        self.verdict = Verdict("output")

    @property
    def held(self) -> int:
        """Characters that wait."""
        return sum(window.held for window in self._windows) if self.changes else 0

    def feed(self, text: str) -> str:
        return self._through(text, last=False)

    def close(self) -> str:
        """The rest, when the answer has ended."""
        return self._through("", last=True)

    def _through(self, text: str, *, last: bool) -> str:
        original = text
        for number, window in enumerate(self._windows):
            pieces = window.feed(text) if text else []
            if last:
                pieces += window.close()
            text = "".join([self._shown(number, piece) for piece in pieces])
        # Guards that only look hold nobody up: what came goes on.
        return text if self.changes else original

    def _shown(self, number: int, piece: Piece) -> str:
        start = self._places[number]
        self._places[number] = start + len(piece.text)
        rule = self._rules.get(piece.kind) if piece.kind else None
        if rule is None or piece.kind is None:
            return piece.text
        name, guard, version = rule
        if not piece.again:
            end = start + len(piece.text)
            self.verdict.add(
                Finding(
                    name, piece.kind, "answer", start, end, version, guard.action, guard.enforced
                ),
                guard,
            )
        if not guard.enforced:
            return piece.text
        if guard.action == "block":
            self.verdict.block("output_blocked", f"The answer was withheld by the guard '{name}'.")
            assert self.verdict.error
            raise self.verdict.error
        return "" if piece.again else self._names(piece.kind, piece.text)
