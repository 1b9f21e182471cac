"""The latency budget of guards, and what their failures do to a request."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import TypeVar

from serving.gateway.envelope import ApiError
from serving.gateway.guards.policy import Guard
from serving.gateway.guards.verdict import Verdict
from serving.gateway.guards.work import Work
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.guards")
T = TypeVar("T")


class Budget:
    """Drives the guards' work, and counts in ``metrics`` what fails."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def spend(
        self, guards: Sequence[Guard], name: str, work: Work[T], verdict: Verdict
    ) -> T | None:
        """The work's result; None when it failed or the shortest budget was over, which the
        verdict then says. Nobody waits for guards in mode async: they have no budget."""
        loop = asyncio.get_running_loop()
        budgets = [guard.budget_ms / 1000 for guard in guards if guard.in_path]
        deadline = loop.time() + min(budgets, default=math.inf)
        try:
            while True:
                next(work)
                if loop.time() > deadline:
                    raise TimeoutError
                await asyncio.sleep(0)
        except StopIteration as done:
            result: T = done.value
            return result
        except ApiError as error:
            verdict.block(error.code, error.message)
        except Exception as error:
            self.failed(name, guards, error, verdict)
        return None

    def failed(
        self, name: str, guards: Sequence[Guard], error: Exception, verdict: Verdict
    ) -> None:
        """A guard did not answer: the request goes on or ends, as the policy says."""
        outcome = "timeout" if isinstance(error, TimeoutError) else "error"
        if outcome == "error":
            log.error("guard %s failed: %s", name, type(error).__name__)
        closed = any(guard.on_timeout == "closed" and guard.enforced for guard in guards)
        policy = "closed" if closed else "open"
        verdict.failures.append(f"{name}: {outcome}, {policy}")
        self._metrics.guard_failures.labels(name, outcome, policy).inc()
        if closed:
            verdict.block("guard_unavailable", f"The guard '{name}' did not answer in time.")
