"""Engines of candidates as processes of this machine, for the controller of a rollout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from contracts.errors import ServiceError
from resources import promotion, releases
from serving.deploy.deployment import Deployer
from serving.deploy.question import Prepared
from serving.engines.record import list_records, stop
from serving.rollout.engines import Busy, Engine


class CandidateEngines(Deployer):
    """Implements ``serving.rollout.engines.Engines``."""

    def install(self, release: str) -> str:
        """The id of a release (a file, or an id) that is installed when this returns. Raises
        RatchetError for one that the gate did not pass."""
        return self._installed(release, self.settings.root).id

    def start(self, release: str) -> Engine:
        """See the protocol."""
        with self._not_busy(f"starting the engine of candidate {release}"):
            installed = releases.verify(self.settings, release)
            prepared = Prepared(installed, self._open_rag)  # while the engine starts
            engine, fresh = self.engines.ready(installed, promotion.named(self.ledger))
            try:
                prepared.ask(engine)
            except BaseException:
                if fresh:
                    stop(engine)
                raise
            return Engine(engine.url, engine.model)

    def alive(self, release: str, url: str) -> bool:
        """See the protocol."""
        record = self.engines.record(release)
        return record is not None and record.alive and record.url == url

    def retire(self) -> None:
        """See the protocol."""
        named = promotion.named(self.ledger)
        if all(r.release in named for r in list_records(self.settings.engines_dir)):
            return
        with self._not_busy("ending engines that nobody needs"):
            self._end_unused(wait=True)

    @contextlib.contextmanager
    def _not_busy(self, what: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._alone(what))
            except ServiceError as error:
                raise Busy(error.what, where=error.where, next=error.next) from None
            yield
