"""Retrieval off the event loop: one thread embeds and searches, a bounded line waits for it.

Embedding is CPU work of milliseconds that holds the loop if done there. One thread is enough: the
model runs on one core, and the engine needs the others. Questions that wait for the same release
are embedded together, which costs far less than one by one; a lone question never waits for
company. Whoever leaves the line is not worked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from contracts.records import Passage
from resources.rag import Rag
from serving.gateway.envelope import ApiError
from serving.gateway.metrics import Metrics


@dataclass
class Waiting:
    rag: Rag
    question: str
    passages: asyncio.Future[list[Passage]]


class Retriever:
    """Runs ``Rag.retrieve_many`` in its thread.

    Args:
        metrics: time and the line's length.
        limit: questions in line; one more is told 503 `overloaded`.
        batch: questions embedded together, at most.
    """

    def __init__(self, metrics: Metrics, *, limit: int = 256, batch: int = 16) -> None:
        self._metrics, self._limit, self._batch = metrics, limit, batch
        self._line: deque[Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "retrieval")
        metrics.retrieval_waiting.set_function(lambda: len(self._line))

    async def retrieve(self, rag: Rag, question: str) -> tuple[list[Passage], float]:
        """Passages and the milliseconds it took, waiting included."""
        if len(self._line) >= self._limit:
            raise ApiError("overloaded", "Too many questions are waiting for retrieval.")
        begun = time.perf_counter()
        found: asyncio.Future[list[Passage]] = asyncio.get_running_loop().create_future()
        self._line.append(Waiting(rag, question, found))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        passages = await found  # a cancelled one is passed over by the worker
        seconds = time.perf_counter() - begun
        self._metrics.retrieval.observe(seconds)
        return passages, seconds * 1000

    def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Empty the line."""
        while self._line:
            batch = self._take()
            if not batch:
                continue
            try:
                await self._serve(batch)
            except Exception:  # one of them may be the cause: the others get an answer of their own
                for item in batch:
                    try:
                        await self._serve([item])
                    except Exception as error:
                        if not item.passages.done():
                            item.passages.set_exception(error)

    def _take(self) -> list[Waiting]:
        """The next questions for one release, in order; those that were cancelled are dropped."""
        batch: list[Waiting] = []
        while self._line and len(batch) < self._batch:
            if batch and self._line[0].rag is not batch[0].rag:
                break
            item = self._line.popleft()
            if not item.passages.done():
                batch.append(item)
        return batch

    async def _serve(self, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        questions = [item.question for item in batch]
        found = await loop.run_in_executor(self._thread, batch[0].rag.retrieve_many, questions)
        for item, passages in zip(batch, found, strict=True):
            if not item.passages.done():
                item.passages.set_result(passages)
