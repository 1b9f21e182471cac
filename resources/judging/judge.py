"""A judge model that is asked each question once.

In: a form (``resources.judging.forms``) and messages. Out: the fields of the answer, or
:class:`~resources.judging.client.Invalid`. Valid answers are kept in
``<state>/caches/judge/<version>.sqlite`` under the digest of what was asked; failures are not, so
that the next run tries them again. The cache holds what judges wrote about answers, and quotes
them: it is as confidential as the request log. No key is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from contracts.errors import ConfigError
from contracts.settings import Settings
from resources.content_cache import ContentCache
from resources.judging.client import Client, Endpoint, Invalid, Message
from resources.judging.forms import Form, canonical

T = TypeVar("T")


@dataclass(frozen=True)
class Judgement:
    """An answer of the judge, read."""

    fields: dict[str, Any]
    served: str  # the model that gave it, as its server says
    cached: bool


class Judge:
    """Use as ``async with Judge(endpoint, caches) as judge``, or by :func:`judged`.

    Args:
        caches: folder of the answers; None keeps none.
    """

    def __init__(self, endpoint: Endpoint, caches: Path | None = None) -> None:
        self.endpoint = endpoint
        self._client = Client(endpoint)
        self._folder = caches
        self._caches: dict[str, ContentCache] = {}
        self._asked: dict[str, asyncio.Task[Judgement]] = {}

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._client.__aexit__(kind, error, trace)
        for cache in self._caches.values():
            cache.close()

    def version(self, form: Form) -> str:
        return form.version(self.endpoint.model)

    async def ask(self, form: Form, messages: Sequence[Message]) -> Judgement:
        """The judgement; what is asked twice at once is sent once. Raises Invalid."""
        key = hashlib.sha256(canonical([self.version(form), list(messages)]).encode()).hexdigest()
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._answer(form, messages, key))
        return await asyncio.shield(self._asked[key])

    async def _answer(self, form: Form, messages: Sequence[Message], key: str) -> Judgement:
        cache = self._cache(form)
        with contextlib.suppress(Invalid, ValueError, KeyError, sqlite3.Error):
            if cache is not None and (kept := cache.get([key]).get(key)) is not None:
                value = json.loads(kept)
                return Judgement(form.read(value["text"]), value["served"], True)
        reply = await self._client.complete(messages, form.name, form.schema, **form.params)
        judgement = Judgement(form.read(reply.text), reply.served, False)
        if cache is not None:
            value = {"text": reply.text, "served": reply.served}
            with contextlib.suppress(sqlite3.Error):  # a full disk costs the cache, not the verdict
                cache.put({key: json.dumps(value, ensure_ascii=False).encode()})
        return judgement

    def _cache(self, form: Form) -> ContentCache | None:
        if self._folder is None:
            return None
        version = self.version(form)
        if version not in self._caches:
            self._caches[version] = ContentCache(self._folder / f"{version}.sqlite")
        return self._caches[version]


def judged(
    endpoint: Endpoint, caches: Path | None, work: Callable[[Judge], Coroutine[Any, Any, T]]
) -> T:
    """Run ``work`` with an open judge, in an event loop of its own; blocks."""

    async def run() -> T:
        async with Judge(endpoint, caches) as judge:
            return await work(judge)

    return asyncio.run(run())


def endpoint_of(model: str, settings: Settings) -> Endpoint:
    """The judge ``model`` at JUDGE_URL. Raises ConfigError without an address."""
    if settings.judge_url is None:
        raise ConfigError(
            "params.yaml names a judge, and where it answers is not set.",
            where="params.yaml: scorecard.judge",
            next="set JUDGE_URL, e.g. http://127.0.0.1:8000, or scorecard.judge: null",
        )
    return Endpoint(settings.judge_url, model, settings.judge_api_key)


def cache_folder(settings: Settings) -> Path:
    return settings.caches_dir / "judge"


__all__ = ["Endpoint", "Invalid", "Judge", "Judgement", "cache_folder", "endpoint_of", "judged"]
