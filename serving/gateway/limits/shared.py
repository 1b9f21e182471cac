"""Limits that several workers share: what is the same for every store.

A store is asked under a deadline. The first failure opens a breaker: from then on requests follow
``on_outage`` at once, and only the tending task tries the store again, every PROBE_SECONDS. So an
outage costs a few requests one deadline each, and the others nothing. A deadline that is missed
while others are answered is a busy machine: that request follows ``on_outage``, the breaker stays.

Settling goes through a queue, so that a request never waits for it and an outage loses none of it.
A lease in the store lives ``lease_seconds``; this worker renews its own while they are open, so
what a killed worker held comes back by itself. A settlement that was sent and not answered is sent
again with ``again``: it then counts only if the lease is still there. So what was reserved before
an outage is settled exactly once when the outage is shorter than ``lease_seconds``, and anything
else at most once: nobody pays twice.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import itertools
import logging
import secrets
import time
from dataclasses import dataclass

from resources.keys import Key
from serving.gateway.auth import Principal
from serving.gateway.limits.account import Refusal
from serving.gateway.limits.config import Limits, Plan, Rules, nano, plan
from serving.gateway.limits.lease import Lease, refused, unavailable
from serving.gateway.limits.memory import MemoryLimiter
from serving.gateway.metrics import Metrics

log = logging.getLogger("ratchet.gateway.limits")
PROBE_SECONDS = 0.25
#: Settlements that may wait, and for how long: an outage of ten minutes at 150 requests/s.
MAX_WAITING = 100_000
MAX_WAIT_SECONDS = 600.0
BATCH = 100

Accounts = tuple[tuple[str, Rules], ...]


@dataclass(slots=True)
class Settlement:
    """What a lease is settled at: tokens, and billionths of money."""

    lease: str
    accounts: Accounts
    tokens: int
    money: int
    since: float  # time.monotonic() of settling
    again: bool = False  # sent before, and whether it arrived is not known


@dataclass(frozen=True, slots=True)
class Granted:
    """What remains for the first account: requests and tokens."""

    requests: int
    tokens: int


class StoreDown(Exception):
    """The store did not answer, or not in time. Nothing is known about what it did."""


class SharedLimiter(abc.ABC):
    """See Limiter; a subclass speaks to one store.

    Args:
        config: the limits, the deadline, the policy for outages.
        metrics: counts refusals, outages and lost settlements.
    """

    def __init__(self, config: Limits, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._local = MemoryLimiter(config, metrics)  # what enforces while the store is away
        self._plans: dict[str, tuple[Key, Plan]] = {}
        self._names = (f"{secrets.token_hex(6)}-{number}" for number in itertools.count())
        self._open: dict[str, Accounts] = {}  # leases of this worker
        self._queue: collections.deque[Settlement] = collections.deque()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._up = True
        self._renewed = self._answered = time.monotonic()
        self._complained = float("-inf")

    # -- what a store does; each raises StoreDown -----------------------------------------------

    @abc.abstractmethod
    async def _reserve(
        self, name: str, accounts: Accounts, tokens: int, money: int
    ) -> Granted | Refusal: ...

    @abc.abstractmethod
    async def _settle(self, batch: list[Settlement]) -> None: ...

    @abc.abstractmethod
    async def _renew(self, leases: dict[str, Accounts]) -> None: ...

    @abc.abstractmethod
    async def _probe(self) -> None:
        """Whether the store answers; connects anew if it must."""

    @abc.abstractmethod
    async def _disconnect(self) -> None: ...

    # -- the Limiter ----------------------------------------------------------------------------

    def configure(self, config: Limits) -> None:
        self._config, self._plans = config, {}
        self._local.configure(config)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics.leases.set_function(lambda: len(self._open))
        self._metrics.settlements_waiting.set_function(lambda: len(self._queue))
        try:
            await self._probe()
        except StoreDown as error:
            self._down(error)
        self._tasks = [
            asyncio.create_task(self._tend(), name="tend-limits"),
            asyncio.create_task(self._drain(), name="settle-limits"),
        ]

    async def close(self) -> None:
        """Settle what waits, for at most two seconds, and disconnect."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._queue:
            self._metrics.settlements_dropped.inc(len(self._queue))
        await self._disconnect()

    async def flush(self) -> None:
        """Wait until everything that was settled so far is in the store, or the store is down."""
        await asyncio.sleep(0)  # leases that were lost just now reach the queue
        while self._queue and self._up:
            await asyncio.sleep(0.005)

    async def reserve(
        self, principal: Principal, *, tokens: int, cost: float, session: str = ""
    ) -> Lease:
        accounts = self._plan(principal).of(principal, session)
        if not accounts:
            return Lease(self, "", None)
        name = next(self._names)
        if self._up:
            asked = time.monotonic()
            try:
                answer = await self._asked(name, accounts, tokens, nano(cost))
            except StoreDown as error:
                if self._answered <= asked:
                    self._down(error)
            else:
                self._answered = time.monotonic()
                if isinstance(answer, Refusal):
                    raise refused(answer, self._metrics)
                self._open[name] = accounts
                own = accounts[0][1] if accounts[0][1].scope == "key" else None
                return Lease(self, name, None, own, (answer.requests, answer.tokens))
        if self._config.on_outage == "deny":
            raise unavailable(self._metrics)
        self._metrics.limits_outage.labels("allow").inc()
        local = self._local.take(principal, tokens=tokens, cost=cost, session=session)
        self._open[name] = accounts
        return Lease(self, name, local, local.rules, local.remaining)

    def ample(self, principal: Principal, *, tokens: int, cost: float, session: str = "") -> bool:
        """Only the store knows what others have used."""
        return not any(
            (rules.tokens, rules.day, rules.month) != (None, None, None)
            for _, rules in self._plan(principal).of(principal, session)
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

    async def _asked(
        self, name: str, accounts: Accounts, tokens: int, money: int
    ) -> Granted | Refusal:
        """Ask under the deadline. Whoever stops waiting, client or deadline, gives back what the
        store may have reserved."""
        try:
            async with asyncio.timeout(self._config.timeout_ms / 1000):
                return await self._reserve(name, accounts, tokens, money)
        except TimeoutError:
            self._put(name, accounts, 0, 0, again=True)
            raise StoreDown(f"no answer within {self._config.timeout_ms} ms") from None
        except asyncio.CancelledError:
            self._put(name, accounts, 0, 0, again=True)
            raise

    def settle(self, lease: Lease, tokens: int, cost: float) -> None:
        if isinstance(lease.held, Lease):
            lease.held.settle(tokens=tokens, cost=cost)
        accounts = self._open.pop(lease.name, None)
        if accounts is not None:
            self._put(lease.name, accounts, tokens, nano(cost))

    def lost(self, lease: Lease) -> None:
        """From any thread. Without a loop the store's own expiry returns it."""
        accounts = self._open.pop(lease.name, None)
        if accounts is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, lease.name, accounts, 0, 0)

    # -- behind the requests --------------------------------------------------------------------

    def _put(
        self, name: str, accounts: Accounts, tokens: int, money: int, again: bool = False
    ) -> None:
        if len(self._queue) >= MAX_WAITING:
            self._queue.popleft()
            self._metrics.settlements_dropped.inc()
        self._queue.append(Settlement(name, accounts, tokens, money, time.monotonic(), again))
        self._wake.set()

    async def _drain(self) -> None:
        """Settle for ever. What fails stays in front, to be sent again."""
        while True:
            if not self._queue or not self._up:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = list(itertools.islice(self._queue, BATCH))
            try:
                async with asyncio.timeout(max(2.0, self._config.timeout_ms / 1000)):
                    await self._settle(batch)
            except (StoreDown, TimeoutError) as error:
                for one in batch:
                    one.again = True
                self._down(error)
                continue
            except Exception:  # a bug must not stop all settling: give this batch up
                log.exception("settlements cannot be written")
                self._metrics.settlements_dropped.inc(len(batch))
            for _ in batch:
                self._queue.popleft()

    async def _tend(self) -> None:
        """Look whether a store that was down is back; renew leases; drop what waited too long."""
        while True:
            await asyncio.sleep(min(PROBE_SECONDS, self._config.lease_seconds / 6))
            try:
                async with asyncio.timeout(max(1.0, self._config.timeout_ms / 1000)):
                    if not self._up:
                        await self._probe()
                        self._up = True
                        log.warning("the store of the limits answers again")
                        self._wake.set()
                    elif time.monotonic() - self._renewed > self._config.lease_seconds / 3:
                        self._renewed = time.monotonic()
                        if self._open:
                            await self._renew(dict(self._open))
            except (StoreDown, TimeoutError) as error:
                self._down(error)
            except Exception:
                log.exception("tending the limits failed")
            oldest = time.monotonic() - MAX_WAIT_SECONDS
            while self._queue and self._queue[0].since < oldest:
                self._queue.popleft()
                self._metrics.settlements_dropped.inc()

    def _down(self, error: Exception) -> None:
        """Open the breaker. At most one line in ten seconds."""
        self._up = False
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.error("the store of the limits is down (%s): %s", self._config.on_outage, error)
