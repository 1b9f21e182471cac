"""What a failed attempt means: a stable code for the client, an outcome for the router.

``outcome`` says whether the circuit breaker counts it and whether another candidate may do better.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import orjson

from serving.gateway.envelope import ApiError
from serving.gateway.http_connection import Answer, BrokenError, NoHttpError

Dialect = Literal["vllm", "openai"]
#: What an attempt came to. A label of metrics.
Outcome = Literal[
    "ok", "unreachable", "timeout", "error", "disconnected", "malformed",  # the upstream's failures
    "saturated",  # a full queue or a rate limit: it works, and not for us now
    "refused",  # our request is wrong, for every candidate alike
    "denied",  # our key, or the model's name, is wrong for this candidate
    "cancelled",  # we left
]  # fmt: skip
#: What the circuit breaker counts. A 4xx never does, and a full queue never does.
FAILURES = frozenset({"unreachable", "timeout", "error", "disconnected", "malformed"})
#: What a client is told, by what the attempt came to.
CODES: dict[Outcome, str] = {
    "unreachable": "engine_unreachable",
    "timeout": "engine_timeout",
    "error": "engine_error",
    "disconnected": "engine_disconnected",
    "malformed": "engine_malformed_stream",
    "saturated": "engine_overloaded",
    "refused": "engine_refused_request",
    "denied": "engine_error",
}
MAX_REFUSAL = 64_000
MAX_RETRY_AFTER = 60.0


class UpstreamError(ApiError):
    """A failed attempt.

    Attributes:
        outcome: what it means to the router.
        retry_after: seconds that the upstream asked us to stay away.
    """

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"retry-after": str(math.ceil(retry_after))}
        super().__init__(code or CODES[outcome], message, param, headers)
        self.outcome, self.retry_after = outcome, retry_after

    @property
    def counts(self) -> bool:
        """Whether it is the upstream's failure."""
        return self.outcome in FAILURES

    @property
    def elsewhere(self) -> bool:
        """Whether another attempt may do better."""
        return self.outcome != "refused"


async def refusal(response: Answer, dialect: Dialect, until: float) -> UpstreamError:
    """What a status other than 200 means. A client reads the engine's words on its own faults.
    Raises TimeoutError when they are not here at ``until``, by the loop's clock."""
    message, envelope = await _message(response, until)
    status, wait = response.status, retry_after(response.header(b"retry-after"))
    if status == 429:
        return UpstreamError("saturated", "The engine takes no more now.", retry_after=wait)
    if status == 503 and (wait is not None or (envelope and dialect == "vllm")):
        # vLLM's full queue says so in its envelope; a proxy's page before a dead engine does not.
        return UpstreamError("saturated", "The engine's queue is full.", retry_after=wait)
    if status == 504 or status == 408:
        return UpstreamError("timeout", f"The engine answered {status}.")
    if status in (400, 413, 422):
        if "context length" in message or "maximum input length" in message:
            return UpstreamError(
                "refused", message, code="context_length_exceeded", param="messages"
            )
        return UpstreamError("refused", message or "The engine refused the request.")
    if 400 <= status < 500:
        return UpstreamError("denied", f"The engine answered {status} to the gateway.")
    return UpstreamError("error", f"The engine answered {status}.")


async def _message(response: Answer, until: float) -> tuple[str, bool]:
    """What a refusal says, and whether it says it in the OpenAI envelope."""
    with contextlib.suppress(BrokenError, NoHttpError):
        raw = bytearray()
        while len(raw) < MAX_REFUSAL and (piece := await response.read(until)):
            raw += piece
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(raw)
            if isinstance(value, dict):
                error = value.get("error", value)
                if isinstance(error, dict):
                    return str(error.get("message", ""))[:1000], True
                return str(error)[:1000], True
    return "", False


def retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, at most MAX_RETRY_AFTER; None when it says none.

    A date is compared with this machine's clock.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if math.isfinite(seconds) else None


def in_stream_error(error: Any) -> UpstreamError:
    """An ``error`` object inside an answer that began with status 200."""
    message = str(error.get("message", "") if isinstance(error, dict) else error)[:300]
    code = str(error.get("code", "")) if isinstance(error, dict) else ""
    if code in ("429", "503"):
        return UpstreamError("saturated", "The engine's queue is full.")
    if re.fullmatch(r"4\d\d", code):
        return UpstreamError("refused", message or "The engine refused the request.")
    return UpstreamError("error", f"The engine failed while answering: {message}")
