"""Limits of one worker, in memory: a decision takes microseconds and waits for nothing.

Windows run on the monotonic clock, and so do the days: Unix time is taken once at the start, so
that a clock that is set while the gateway runs mints nothing. What was spent is in a journal and
survives; windows, reservations and slots end with the process, which is the end of the requests
that held them.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

from resources.keys import Key
from serving.gateway.auth import Principal
from serving.gateway.limits.account import Account, Calendar
from serving.gateway.limits.config import Limits, Plan, Rules, nano, plan
from serving.gateway.limits.journal import SpendJournal
from serving.gateway.limits.lease import Lease, refused
from serving.gateway.metrics import Metrics

#: Windows of sessions that may be kept; what idled longest goes first. About 1 kB each.
MAX_SESSIONS = 100_000


class MemoryLimiter:
    """See Limiter. All calls come from one event loop; leases may be lost in any thread.

    Args:
        config: the limits.
        metrics: counts refusals, shows open leases.
        journal: keeps what was spent; None: nothing survives.
        monotonic, wall: clocks in seconds, for tests.
    """

    def __init__(
        self,
        config: Limits,
        metrics: Metrics,
        journal: SpendJournal | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._metrics, self._journal = config, metrics, journal
        self._clock = monotonic
        self._offset = wall() - monotonic()
        self._calendar = Calendar()
        self._plans: dict[str, tuple[Key, Plan]] = {}
        self._accounts: dict[str, Account] = {}
        self._sessions: collections.OrderedDict[str, Account] = collections.OrderedDict()
        self._lost: collections.deque[Any] = collections.deque()
        self.leases = 0

    def configure(self, config: Limits) -> None:
        self._config, self._plans = config, {}

    async def start(self) -> None:
        if self._journal is not None:
            await self._journal.start()
        self._metrics.leases.set_function(lambda: self.leases)

    async def close(self) -> None:
        self._return_lost()
        if self._journal is not None:
            await self._journal.close()

    async def reserve(
        self, principal: Principal, *, tokens: int, cost: float, session: str = ""
    ) -> Lease:
        return self.take(principal, tokens=tokens, cost=cost, session=session)

    def ample(self, principal: Principal, *, tokens: int, cost: float, session: str = "") -> bool:
        money, now = nano(cost), self._clock()
        calendar = self._calendar.at(now + self._offset)
        return all(
            (self._accounts.get(name) or self._account(name, rules)).ample(
                rules, now, calendar, tokens, money
            )
            for name, rules in self._plan(principal).of(principal, session)
        )

    def _plan(self, principal: Principal) -> Plan:
        """What holds for a key."""
        known = self._plans.get(principal.key_id)
        if known is None or known[0] is not principal.key:
            known = self._plans[principal.key_id] = (
                principal.key,
                plan(self._config, principal),
            )
        return known[1]

    def take(self, principal: Principal, *, tokens: int, cost: float, session: str = "") -> Lease:
        """:meth:`reserve`, for callers that are not coroutines."""
        if self._lost:
            self._return_lost()
        drawn = self._plan(principal).of(principal, session)
        money = nano(cost)
        now = self._clock()
        wall = now + self._offset
        calendar = self._calendar.at(wall)
        accounts = []
        for name, rules in drawn:
            account = self._accounts.get(name) or self._account(name, rules)
            refusal = account.refuse(rules, now, wall, calendar, tokens, money)
            if refusal is not None:
                raise refused(refusal, self._metrics)
            accounts.append((name, account))
        held = (
            [(name, account, account.take(now, tokens, money)) for name, account in accounts],
            tokens,
            money,
        )
        self.leases += 1
        if drawn and (rules := drawn[0][1]).scope == "key":
            account = accounts[0][1]
            left = (
                (rules.requests or 0) - account.requests.total,
                (rules.tokens or 0) - account.tokens.total,
            )
            return Lease(self, "", held, rules, left)
        return Lease(self, "", held)

    def settle(self, lease: Lease, tokens: int, cost: float) -> None:
        self._settle(lease.held, tokens, cost)

    def lost(self, lease: Lease) -> None:
        """Called by the garbage collector, in whichever thread: only remember."""
        self._lost.append(lease.held)

    def _return_lost(self) -> None:
        while self._lost:
            self._settle(self._lost.popleft(), 0, 0.0)

    def _settle(self, held: Any, tokens: int, cost: float) -> None:
        accounts, reserved, reserved_money = held
        self.leases -= 1
        now = self._clock()
        calendar = self._calendar.at(now + self._offset)
        money = nano(cost)
        for name, account, part in accounts:
            account.settle(now, calendar, (part, reserved, reserved_money), tokens, money)
            if money and self._journal is not None and account.budget:
                self._journal.add(name, calendar.day, calendar.month, money)

    def _account(self, name: str, rules: Rules) -> Account:
        """The account of that name, made when it is used first."""
        if rules.scope == "session":
            return self._session(name, rules)
        account = self._accounts[name] = Account(rules.window, budget=True)
        if self._journal is not None:
            account.roll(self._calendar)
            account.day_spent, account.month_spent = self._journal.spent(
                name, self._calendar.day, self._calendar.month
            )
        return account

    def _session(self, name: str, rules: Rules) -> Account:
        """Sessions come and go: those whose windows are empty are forgotten, oldest first."""
        sessions = self._sessions
        account = sessions.pop(name, None) or Account(rules.window)
        sessions[name] = account
        for _ in range(2):  # one comes, up to two go
            oldest = next(iter(sessions.values()))
            oldest.tokens.prune(self._clock())
            idle = not oldest.live and not oldest.tokens.parts and oldest is not account
            if not idle and len(sessions) <= MAX_SESSIONS:
                break
            sessions.popitem(last=False)
        return account
