"""One chat completion from any OpenAI-compatible server, or the reason why there is none.

In: messages and the JSON schema that the answer must have (``response_format``). Out: the answer's
text and the model that gave it. Whatever goes wrong is :class:`Invalid`: a timeout, a refusal, an
answer that was cut off, a body that is no completion. 429 and 503 are asked again, as long after as
``Retry-After`` says, a few times and within the call's deadline. The key goes into one header, to
one address: redirects are not followed and no message repeats it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from resources.remote_embedding import excerpt, retry_after

if TYPE_CHECKING:
    import aiohttp

#: A verdict of 512 tokens is 4 KB; a body of more than this is none.
MAX_BYTES = 1 << 20
BUSY = frozenset({429, 503})
FIRST_PAUSE = 0.25  # seconds, doubled at every try, where the server names none

Message = Mapping[str, str]


class Invalid(Exception):
    """No verdict. ``kind`` is one word for counting, ``detail`` says more."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """Where the judge answers, and how long it may take.

    Attributes:
        url: of the server, with or without ``/v1``.
        deadline: seconds for one call with all its tries; waiting for a place does not count.
        concurrent: calls under way at once.
        tries: at most, of one call.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    deadline: float = 60.0
    concurrent: int = 8
    tries: int = 4

    @property
    def address(self) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    text: str
    served: str  # the model as the server names it: behind an alias it may change


class Client:
    """Use as ``async with Client(endpoint) as client``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._session: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(endpoint.concurrent)

    async def __aenter__(self) -> Self:
        import aiohttp

        headers = {"Authorization": f"Bearer {self.endpoint.key}"} if self.endpoint.key else {}
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(total=None), trust_env=False
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(
        self, messages: Sequence[Message], name: str, schema: Mapping[str, Any], **params: Any
    ) -> Reply:
        """One completion that the server was told to shape by ``schema``. Raises Invalid."""
        body = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "strict": True, "schema": schema},
            },
            **params,
        }
        async with self._places:
            try:
                async with asyncio.timeout(self.endpoint.deadline):
                    return reply_of(await self._asked(json.dumps(body).encode()))
            except TimeoutError:
                raise Invalid("timeout", f"no answer in {self.endpoint.deadline:g} s") from None

    async def _asked(self, body: bytes) -> bytes:
        """The body of the first answer that is not "busy"."""
        pause, until = FIRST_PAUSE, time.monotonic() + self.endpoint.deadline
        for left in range(self.endpoint.tries - 1, -1, -1):
            status, wait, answer = await self._post(body)
            if status == 200:
                return answer
            wait = pause * random.uniform(0.5, 1) if wait is None else wait
            if status not in BUSY or not left or time.monotonic() + wait >= until:
                break
            await asyncio.sleep(wait)
            pause *= 2
        detail = excerpt(answer)
        if self.endpoint.key:  # some servers quote it
            detail = detail.replace(self.endpoint.key, "***")
        raise Invalid(f"http_{status}", detail)

    async def _post(self, body: bytes) -> tuple[int, float | None, bytes]:
        """Status, seconds of Retry-After, and the whole body of one try."""
        import aiohttp

        assert self._session is not None, "use `async with`"
        headers = {"Content-Type": "application/json"}
        address = self.endpoint.address
        try:
            async with self._session.post(
                address, data=body, headers=headers, allow_redirects=False
            ) as response:
                found = bytearray()
                async for part in response.content.iter_any():
                    found += part
                    if len(found) > MAX_BYTES:
                        raise Invalid("too_long", f"the answer exceeds {MAX_BYTES} bytes")
                return (
                    response.status,
                    retry_after(response.headers.get("Retry-After")),
                    bytes(found),
                )
        except (aiohttp.ClientError, OSError) as error:
            raise Invalid("unreachable", type(error).__name__) from None


def reply_of(body: bytes) -> Reply:
    """The first choice's text. Raises Invalid for a refusal, a cut or no completion at all."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content")
        served = str(value.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Invalid("no_completion", excerpt(body, 120)) from None
    if refusal or reason == "content_filter":
        raise Invalid("refused", "the judge refuses to judge")
    if reason == "length":
        raise Invalid("cut_off", "the answer ended at max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise Invalid("empty", "the answer has no text")
    return Reply(text, served)
