"""Copies of requests for a candidate that answers nobody: the only trace is a row of the log.

A copy begins when the stable release's answer has ended, as a task of its own: nobody waits for it.
It asks for no limits, reads and writes no cache, exposes nobody to a prompt and is no request in
the metrics of requests, spans or the audit log. What it needs besides the engine (retrieval, prompt
rendering, breaker, retries) are parts of its own, so that a candidate that hangs in one of them
holds up nothing. At most ``LIMIT`` copies are at work; more are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from contracts.settings import Settings
from serving.gateway import release
from serving.gateway.cache.response_cache import Flight
from serving.gateway.chat_request import ChatRequest
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import Metrics
from serving.gateway.prompt_choice import PromptChooser
from serving.gateway.reply import Reply
from serving.gateway.retrieval import Retriever
from serving.gateway.routing.config import Retries, Routing
from serving.gateway.routing.router import Router
from serving.gateway.split import Trial, takes
from serving.gateway.turn import Turn
from serving.gateway.upstream import UpstreamClient

log = logging.getLogger("ratchet.gateway.shadow")
#: Copies at work at once: a candidate that is slower than the stable release is measured on fewer.
LIMIT = 4


class Shadow:
    """Runs copies.

    Args:
        client: speaks to the candidate's engine.
        metrics: counts copies by outcome.
        routing: its timeouts and breaker's policy hold for copies too.
        secret: keys the hashes of sessions and the choice of requests.
        keep: takes a row for the request log; never waits.
        settings: where the certified pairs are.
    """

    def __init__(
        self,
        client: UpstreamClient,
        metrics: Metrics,
        routing: Routing,
        secret: bytes,
        keep: Callable[[dict[str, Any]], object],
        settings: Settings,
    ) -> None:
        self._metrics, self._secret, self._keep = metrics, secret, keep
        self._unseen = Metrics()  # what copies would count twice
        self._router = Router(client, self._unseen, _once(routing), salt=secret)
        self._retriever, self._prompts = Retriever(self._unseen), PromptChooser(secret, settings)
        self._tasks: set[asyncio.Task[None]] = set()

    def configure(self, routing: Routing) -> None:
        """Use other timeouts from the next copy on."""
        self._router.configure(_once(routing))

    def offer(self, turn: Turn, trial: Trial, asked: ChatRequest) -> None:
        """A request was answered by the stable release; copy it, if it is among the share."""
        if trial.live is None or not takes(
            trial.candidate, turn.exchange, turn.principal.tenant, self._secret
        ):
            return
        if len(self._tasks) >= LIMIT:
            self._metrics.shadowed.labels("dropped").inc()
            return
        task = asyncio.create_task(self._copy(turn, trial, asked), name="shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End the copies at work; they leave no row."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._retriever.close()
        self._prompts.close()

    async def _copy(self, turn: Turn, trial: Trial, asked: ChatRequest) -> None:
        live, first = trial.live, turn.exchange
        assert live is not None
        asked = replace(asked, stream=False)
        exchange = Exchange(
            first.channel, live=live, question=asked.question, principal=first.principal,
            model=first.model, session=first.session, feature=first.feature,
            rollout=trial.candidate.rollout, arm="shadow",
        )  # fmt: skip
        parts = replace(
            turn.services, router=self._router, retriever=self._retriever, prompts=self._prompts
        )
        nobody = cast(Reply, _Nobody())
        copy = Turn(parts, turn.now, exchange, nobody, turn.principal, turn.policy)
        try:
            plan = self._prompts.plan(turn.now.config.prompts, live)
            exchange.choice = plan.choose(
                turn.principal.tenant, exchange.session, first.response_id
            )
            await release.ask(copy, live, asked, cast(Flight, _Unkept()))
        except ApiError as error:
            exchange.error = error
        except Exception as error:
            log.error("%s, a copy, failed: %s", exchange.response_id, type(error).__name__)
            exchange.error = ApiError("internal_error", "The copy failed.")
        row = exchange.finish(self._unseen, self._secret)
        self._metrics.shadowed.labels(row["error"] or "ok").inc()
        self._keep(row)


class _Unkept:
    """The place in the cache of an answer that is not for it."""

    def write(self, data: bytes) -> None:
        """Forget."""


class _Nobody:
    """The response to a client that is not there."""

    started = False

    async def frame(self, data: bytes) -> None:
        """Forget."""


def _once(routing: Routing) -> Routing:
    """The same patience, and no second attempt: a retry would hide what the candidate does."""
    return Routing(
        release_timeouts=routing.release_timeouts,
        retries=Retries(attempts=1),
        breaker=routing.breaker,
    )
