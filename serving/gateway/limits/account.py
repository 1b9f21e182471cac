"""The arithmetic of limits, without a clock and without a store.

A *window* is cut into PARTS equal parts; what lies in a part that has not left the window entirely
counts whole. So a limit holds in every window of its length, wherever it begins, and a client that
uses all it may gets at least PARTS/(PARTS+1) of it. An *account* has a window of requests, one of
tokens, requests in flight, and what was spent in a UTC day and month, reservations apart. The Lua
script in redis.lua computes the same; tests/serving/test_limits.py holds them to each other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from serving.gateway.limits.config import Rules

PARTS = 20
DAY = 86_400


@dataclass(frozen=True, slots=True)
class Refusal:
    """What did not fit. ``retry_after`` in seconds; None: it never will."""

    limit: str  # requests, tokens, concurrent, spend_day, spend_month
    scope: str
    retry_after: float | None


class Calendar:
    """Which UTC day and month it is, from Unix seconds; never an earlier one than before."""

    __slots__ = ("_ends", "day", "month")

    def __init__(self) -> None:
        self.day, self.month, self._ends = 0, 0, 0.0

    def at(self, now: float) -> Calendar:
        if now >= self._ends:
            found = time.gmtime(now)
            self.day = int(now // DAY)
            self.month = found.tm_year * 12 + found.tm_mon - 1
            self._ends = (self.day + 1) * float(DAY)
        return self

    def day_left(self, now: float) -> float:
        """Seconds to the end of the day."""
        return max(1.0, self._ends - now)

    def month_left(self, now: float) -> float:
        """Seconds to the end of the month."""
        day, month = self._ends, self.month
        while Calendar().at(day).month == month:
            day += DAY
        return max(1.0, day - now)


class Window:
    """Amounts by part; ``total`` is of the parts that count."""

    __slots__ = ("parts", "total", "width")

    def __init__(self, seconds: float) -> None:
        self.width = seconds / PARTS
        self.parts: dict[int, int] = {}  # ascending
        self.total = 0

    def prune(self, now: float) -> int:
        """Forget what has left the window; give the part that is now."""
        part = int(now / self.width)
        parts, oldest = self.parts, part - PARTS
        while parts:
            first = next(iter(parts))
            if oldest <= first:
                break
            self.total -= parts.pop(first)
        return part

    def add(self, part: int, amount: int) -> None:
        self.parts[part] = self.parts.get(part, 0) + amount
        self.total += amount

    def give_back(self, part: int, amount: int) -> None:
        """Take ``amount`` out of a part again, if that part still counts."""
        if part in self.parts:
            self.parts[part] -= amount
            self.total -= amount

    def wait(self, now: float, need: int) -> float:
        """Seconds until at least ``need`` have left."""
        for part, amount in self.parts.items():
            need -= amount
            if need <= 0:
                return max(0.001, (part + PARTS + 1) * self.width - now)
        return PARTS * self.width


class Account:
    """What one key, tenant or session has used and holds. Money in billionths."""

    __slots__ = (
        "budget",
        "day",
        "day_spent",
        "held",
        "live",
        "month",
        "month_spent",
        "requests",
        "tokens",
    )

    def __init__(self, window: float, *, budget: bool = False) -> None:
        self.budget = budget  # of a key or tenant: what it spends is remembered
        self.requests, self.tokens = Window(window), Window(window)
        self.live = 0  # reservations not settled
        self.held = 0  # money that they hold
        self.day = self.month = self.day_spent = self.month_spent = 0

    def refuse(
        self, rules: Rules, now: float, wall: float, calendar: Calendar, tokens: int, cost: int
    ) -> Refusal | None:
        """Why a request of that size does not fit now; None when it does. ``now`` in seconds of a
        monotonic clock, ``wall`` in Unix seconds."""
        self.requests.prune(now)
        self.tokens.prune(now)
        if rules.concurrent is not None and self.live >= rules.concurrent:
            return Refusal("concurrent", rules.scope, 1.0)
        if rules.requests is not None:
            over = self.requests.total + 1 - rules.requests
            if over > 0:
                return Refusal("requests", rules.scope, self.requests.wait(now, over))
        if rules.tokens is not None:
            over = self.tokens.total + tokens - rules.tokens
            if over > 0:
                never = tokens > rules.tokens
                wait = None if never else self.tokens.wait(now, over)
                return Refusal("tokens", rules.scope, wait)
        if rules.day is None and rules.month is None:
            return None
        self.roll(calendar)
        for limit, spent, name in (
            (rules.day, self.day_spent, "spend_day"),
            (rules.month, self.month_spent, "spend_month"),
        ):
            if limit is not None and spent + self.held + cost > limit:
                if spent + cost <= limit:
                    left = 1.0  # only reservations are in the way
                else:
                    of_day = name == "spend_day"
                    left = calendar.day_left(wall) if of_day else calendar.month_left(wall)
                return Refusal(name, rules.scope, left)
        return None

    def ample(self, rules: Rules, now: float, calendar: Calendar, tokens: int, cost: int) -> bool:
        """Whether a request of that size would leave nine tenths of every limit on tokens and money
        free, reservations included."""
        if rules.tokens is not None:
            self.tokens.prune(now)
            if 10 * (self.tokens.total + tokens) > rules.tokens:
                return False
        if rules.day is None and rules.month is None:
            return True
        self.roll(calendar)
        more = self.held + cost
        return (rules.day is None or 10 * (self.day_spent + more) <= rules.day) and (
            rules.month is None or 10 * (self.month_spent + more) <= rules.month
        )

    def roll(self, calendar: Calendar) -> None:
        """Begin a new day or month. A clock that went back changes nothing."""
        if calendar.day > self.day:
            self.day, self.day_spent = calendar.day, 0
        if calendar.month > self.month:
            self.month, self.month_spent = calendar.month, 0

    def take(self, now: float, tokens: int, cost: int) -> int:
        """Reserve; give the part that it was booked in."""
        part = int(now / self.tokens.width)
        self.requests.add(part, 1)
        self.tokens.add(part, tokens)
        self.live += 1
        self.held += cost
        return part

    def settle(
        self,
        now: float,
        calendar: Calendar,
        reserved: tuple[int, int, int] | None,
        tokens: int,
        cost: int,
    ) -> None:
        """Put what was used in the place of what was reserved: (part, tokens, cost). None: nothing
        is reserved any more, and everything is added."""
        part = self.tokens.prune(now)
        more = tokens
        if reserved is not None:
            more = tokens - reserved[1]
            self.live -= 1
            self.held -= reserved[2]
            if more < 0:
                self.tokens.give_back(reserved[0], -more)
        if more > 0:
            self.tokens.add(part, more)
        if cost:
            self.roll(calendar)
            self.day_spent += cost
            self.month_spent += cost


@dataclass
class StoredAccount:
    """An account and its reservations by lease: [expires, part, tokens, cost], as JSON keeps it.

    Times are of the machine's monotonic clock, which all processes of a machine share and which
    begins anew when it boots: what lies in the future was written before that.
    """

    account: Account
    leases: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def load(cls, state: dict[str, Any] | None, window: float, now: float) -> StoredAccount:
        """The state that :meth:`dump` gave, without what has expired by ``now``."""
        found = cls(Account(window))
        if state is None:
            return found
        account = found.account
        (account.day, account.day_spent, account.month, account.month_spent) = state["spent"]
        if now < state["at"]:
            return found
        for kept, parts in (
            (account.requests, state["requests"]),
            (account.tokens, state["tokens"]),
        ):
            kept.parts = {int(part): amount for part, amount in parts}
            kept.total = sum(kept.parts.values())
        for lease, (expires, part, tokens, cost) in state["leases"].items():
            if expires > now:
                found.leases[lease] = [expires, part, tokens, cost]
                account.live += 1
                account.held += cost
            else:
                account.tokens.give_back(part, tokens)
        return found

    def dump(self, now: float) -> dict[str, Any]:
        account = self.account
        return {
            "at": now,
            "spent": [account.day, account.day_spent, account.month, account.month_spent],
            "requests": list(account.requests.parts.items()),
            "tokens": list(account.tokens.parts.items()),
            "leases": self.leases,
        }
