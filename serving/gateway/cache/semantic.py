"""The tier that answers a question which means the same as one before. Off by default.

In: a chat request with one user turn after the system prompt. Tenant, the rest of the scope and
what may not differ (meaning.py) are a filter inside the query, so no vector can lead across them;
what comes back is compared with them once more. A share of would-be hits is answered by the model
all the same, and how often both agree is a metric.

Embedding and search run in one thread under one deadline; too slow, too many or away is a miss.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from contracts.settings import Settings
from serving.gateway.api_request import ApiRequest
from serving.gateway.cache.answer import Answer
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.meaning import fingerprint
from serving.gateway.cache.purges import Purge
from serving.gateway.cache.scope import Scope
from serving.gateway.cache.vectors import Found, VectorStore, Wanted, open_vectors
from serving.gateway.metrics import Metrics

if TYPE_CHECKING:
    from resources.rag import Embeds

log = logging.getLogger("ratchet.gateway.cache")
T = TypeVar("T")
#: Longer questions are not looked up: the model reads 254 tokens and cuts the rest off silently,
#: and a token has a byte at least.
MAX_QUESTION = 254
MAX_BODY = 64 << 10
#: Look-ups and writes that may wait for the thread; beyond that it is a miss at once.
MAX_WAITING = 8
#: How long a store that failed is left alone.
PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Near:
    """What a look-up gave: the question's vector, an answer, and whether to ask the model anyway
    and compare."""

    vector: list[float] | None = None
    answer: Answer | None = None
    verify: bool = False


def question_of(request: ApiRequest) -> str | None:
    """The question of a request that this tier is for; None for any other."""
    if request.kind != "chat" or request.n != 1:
        return None
    *before, last = request.body["messages"]
    if last["role"] != "user" or any(one["role"] not in ("system", "developer") for one in before):
        return None
    content = last.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str) or not content.strip():
        return None
    return content if len(content.encode("utf-8", "replace")) <= MAX_QUESTION else None


def wanted(scope: Scope, question: str) -> Wanted:
    """What an entry must have to be found. Raises ValueError without a tenant."""
    if not scope.tenant:
        raise ValueError("a semantic look-up without a tenant would search all of them")
    body = dict(scope.request.body)
    body["messages"] = body["messages"][:-1]
    rest = orjson.dumps((scope.parts, body), option=orjson.OPT_SORT_KEYS)
    same = orjson.dumps(fingerprint(question))
    return Wanted(
        scope.tenant,
        blake2b(rest, digest_size=16).hexdigest(),
        blake2b(same, digest_size=16).hexdigest(),
    )


class SemanticTier:
    """See above.

    Args:
        config: the block ``cache.semantic``.
        embedder: of questions.
        vectors: opens the store; called in this tier's thread.
        metrics: failures, verifications, what was stored.
        chance: gives 0 to 1; for tests.
        wall: Unix seconds; entries end by it, because several workers share a server.
    """

    def __init__(
        self,
        config: Semantic,
        embedder: Embeds,
        vectors: Callable[[], VectorStore],
        metrics: Metrics,
        *,
        chance: Callable[[], float] = random.random,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config, self._embedder, self._open, self._metrics = config, embedder, vectors, metrics
        self._chance, self._wall = chance, wall
        self._store: VectorStore | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="semantic-cache")
        self._waiting = 0
        self._paused_until = float("-inf")
        self._complained = float("-inf")
        self._writes: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, config: Semantic, settings: Settings, metrics: Metrics) -> SemanticTier:
        """With the model that the configuration names, in Qdrant's engine here or at QDRANT_URL.
        Raises ConfigError when the model is not installed."""
        from contracts.params import Vectors
        from resources.embedding import open_embedder

        params = Vectors(model=config.model, batch=1, dtype="float32")
        embedder = open_embedder(params, None, threads=1, device="cpu")
        store = functools.partial(open_vectors, settings, config, embedder.digest[:16])
        return cls(config, embedder, store, metrics)

    async def start(self) -> None:
        """Load the model and open the store; a server that does not answer is tried again."""
        await self._in_thread(lambda: self._embed("warm"))
        try:
            await self._in_thread(self._opened)
        except Exception as error:
            self._failed("get", error)

    async def close(self) -> None:
        await self.flush()
        store, self._store = self._store, None
        if store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, store.close)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def flush(self) -> None:
        """Wait until everything that was put is there."""
        await asyncio.gather(*self._writes, return_exceptions=True)

    async def find(self, scope: Scope) -> Near:
        """The nearest answer of this scope, if it is near enough. Never raises but ValueError."""
        question = question_of(scope.request)
        if question is None:
            return Near()
        want = wanted(scope, question)
        if self._waiting >= MAX_WAITING or time.monotonic() < self._paused_until:
            self._metrics.cache_failures.labels("semantic", "get").inc()
            return Near()
        try:
            async with asyncio.timeout(self.config.budget_ms / 1000):
                vector, found = await self._in_thread(lambda: self._search(question, want))
        except Exception as error:
            self._failed("get", error)
            return Near()
        if found is None or not _same(found, want, question, self.config.threshold):
            return Near(vector)
        return Near(vector, _read(found.payload), self._chance() < self.config.verify)

    def put(
        self, scope: Scope, vector: list[float], answer: Answer, rival: Answer | None = None
    ) -> None:
        """Keep an answer soon; ``rival`` is what would have been said instead of it."""
        question = question_of(scope.request)
        if question is None or self._waiting >= MAX_WAITING:
            return
        task = asyncio.ensure_future(self._put(scope, question, vector, answer, rival))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def purge(self, what: Purge) -> int:
        """Forget what is meant, all that waits to be written included. Raises what the store
        raises."""
        return await self._in_thread(lambda: self._opened().purge(what))

    # -- in the thread ---------------------------------------------------------------------------

    async def _put(
        self, scope: Scope, question: str, vector: list[float], answer: Answer, rival: Answer | None
    ) -> None:
        want = wanted(scope, question)
        payload = _written(scope, question, answer, self._wall() + self.config.ttl_seconds)
        name = "\0".join((want.tenant, want.scope, want.same, question)).encode()
        identity = str(uuid.UUID(bytes=blake2b(name, digest_size=16).digest()))
        try:
            if rival is not None:
                outcome = await self._in_thread(lambda: self._compared(answer, rival))
                self._metrics.cache_verified.labels(outcome).inc()
            if payload is not None:
                await self._in_thread(lambda: self._opened().add(identity, vector, want, payload))
                self._metrics.cache_stored.labels("semantic").inc()
        except Exception as error:
            self._failed("put", error)

    def _search(self, question: str, want: Wanted) -> tuple[list[float], Found | None]:
        vector = self._embed(question)
        found = self._opened().find(vector, want, self._wall(), self.config.threshold)
        return vector, found

    def _compared(self, answer: Answer, rival: Answer) -> str:
        """Whether two answers say the same: near each other, with the same numbers and names."""
        if not answer.text or not rival.text:
            return "unknown"
        if answer.text == rival.text:
            return "agree"
        a, b = self._embed(answer.text), self._embed(rival.text)
        near = sum(x * y for x, y in zip(a, b, strict=True)) >= self.config.agreement
        same = fingerprint(answer.text)[0] == fingerprint(rival.text)[0]
        return "agree" if near and same else "differ"

    def _embed(self, text: str) -> list[float]:
        vector: list[float] = self._embedder.embed_questions([text])[0].tolist()
        return vector

    def _opened(self) -> VectorStore:
        if self._store is None:
            self._store = self._open()
        return self._store

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        future.add_done_callback(self._done)
        return await future

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # of a look-up that nobody waits for any more

    def _failed(self, what: str, error: Exception) -> None:
        """Count it; leave a store that failed alone. At most one line in ten seconds."""
        self._metrics.cache_failures.labels("semantic", what).inc()
        if isinstance(error, TimeoutError):
            return
        now = time.monotonic()
        self._paused_until = now + PAUSE_SECONDS
        if now - self._complained > 10:
            self._complained = now
            log.error("the semantic cache fails: %s", type(error).__name__)


def _same(found: Found, want: Wanted, question: str, threshold: float) -> bool:
    """Look again at what the store found, whatever its filter did."""
    payload = found.payload
    return (
        found.score >= threshold
        and payload.get("tenant") == want.tenant
        and payload.get("scope") == want.scope
        and isinstance(payload.get("question"), str)
        and fingerprint(payload["question"]) == fingerprint(question)
    )


def _written(scope: Scope, question: str, answer: Answer, expires: float) -> dict[str, Any] | None:
    if len(answer.body) > MAX_BODY:
        return None
    return {
        "question": question,
        "release": scope.target.partition("+")[0],
        "model": scope.model,
        "expires": expires,
        "body": answer.body.decode("utf-8"),
        "tokens": [answer.prompt_tokens, answer.completion_tokens],
        "response_id": answer.response_id,
        "text": answer.text,
        "meta": answer.meta.decode("utf-8"),
    }


def _read(payload: dict[str, Any]) -> Answer:
    prompt, completion = payload["tokens"]
    return Answer(
        payload["body"].encode(), prompt, completion, payload["response_id"], payload["text"],
        payload["meta"].encode(),
    )  # fmt: skip
