"""The retry budget: retries are a share of requests, so that they cannot multiply an outage.

Each request puts ``ratio`` of a token into the bucket, each retry takes one. With 10 % a dead
upstream costs 1.1 requests each, not ``attempts`` of them; ``burst`` lets a quiet gateway retry.
"""

from __future__ import annotations


class RetryBudget:
    """A bucket of at most ``burst`` tokens, full at the start."""

    __slots__ = ("_burst", "_ratio", "tokens")

    def __init__(self, ratio: float, burst: float) -> None:
        self._ratio, self._burst = ratio, burst
        self.tokens = burst

    def request(self) -> None:
        """A request came."""
        self.tokens = min(self._burst, self.tokens + self._ratio)

    def retry(self) -> bool:
        """Take a token for a retry; False when there is none."""
        # Ten times 0.1 is a little less than one.
        if self.tokens < 1 - 1e-9:
            return False
        self.tokens -= 1
        return True
