"""The circuit breaker of one replica: stop asking what fails, and try again with one request.

Closed, it counts how attempts end in a rolling window. Many failures open it; after a while one
attempt, and only one, goes through (half-open): its success closes the breaker, its failure opens
it again for twice as long. What is a failure stands in ``upstream_errors.FAILURES``.
"""

from __future__ import annotations

from typing import Literal

from serving.gateway.routing.config import BreakerPolicy

State = Literal["closed", "half_open", "open"]
#: Value of the gauge.
STATES: dict[State, int] = {"closed": 0, "half_open": 1, "open": 2}
_SLOTS = 10


class Breaker:
    """Times are seconds of one monotonic clock, handed in. Not for threads: one event loop.

    ``ready`` asks; ``claim`` takes the place that ``ready`` promised, with nothing awaited between
    the two. Each claim is answered by exactly one of ``success``, ``failure`` and ``release``.
    """

    __slots__ = ("_open_for", "_policy", "_probing", "_ring", "_slot", "state", "until")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._slot = policy.window_seconds / _SLOTS
        self._ring = [[-1, 0, 0] for _ in range(_SLOTS)]  # number of the slot's time, ok, failed
        self._open_for = policy.open_seconds
        self._probing = False
        self.state: State = "closed"
        self.until = 0.0  # when it may be tried again

    def ready(self, now: float) -> bool:
        """Whether an attempt may begin."""
        if self.state == "closed":
            return True
        return not self._probing and now >= self.until

    def claim(self, now: float) -> bool:
        """Begin an attempt; whether it is the probe."""
        if self.state == "closed":
            return False
        assert self.ready(now)
        self.state, self._probing = "half_open", True
        return True

    def success(self, now: float, probe: bool = False) -> None:
        """The attempt ended well. Those that began before the breaker opened prove nothing."""
        if probe:
            self._probing = False
            self.state, self._open_for = "closed", self._policy.open_seconds
            for slot in self._ring:
                slot[0] = -1
        elif self.state == "closed":
            self._count(now, 1)

    def failure(self, now: float, probe: bool = False) -> None:
        """The attempt failed."""
        if probe:
            self._probing = False
            self._open_for = min(2 * self._open_for, self._policy.max_open_seconds)
            self._open(now)
        elif self.state == "closed":
            self._count(now, 2)
            ok, failed = self.counts(now)
            policy = self._policy
            if failed >= policy.failures and failed >= policy.ratio * (ok + failed):
                self._open(now)

    def release(self, probe: bool = False) -> None:
        """The attempt ended without saying anything about the replica."""
        if probe:
            self._probing = False

    def counts(self, now: float) -> tuple[int, int]:
        """Attempts that ended well and that failed in the window."""
        oldest = int(now / self._slot) - _SLOTS
        live = [slot for slot in self._ring if slot[0] > oldest]
        return sum(slot[1] for slot in live), sum(slot[2] for slot in live)

    def _count(self, now: float, what: int) -> None:
        number = int(now / self._slot)
        slot = self._ring[number % _SLOTS]
        if slot[0] != number:
            slot[:] = [number, 0, 0]
        slot[what] += 1

    def _open(self, now: float) -> None:
        self.state, self.until = "open", now + self._open_for
