"""Small synchronous questions to an engine: is it healthy, do tokens flow, how busy is it.

Plain urllib, because deploy, the supervisor and the profile stage need no event loop.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

from contracts.errors import ServiceError

#: The two gauges that together say whether anybody still waits for this engine.
_BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.M)
# An engine is on this machine or this network: a proxy from the environment must not see it.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def healthy(url: str, timeout: float = 2.0) -> bool:
    """Whether ``GET /health`` answers 200."""
    try:
        with _open(f"{url}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def chat(
    url: str, model: str, messages: list[dict[str, str]], *, max_tokens: int, timeout: float
) -> dict[str, Any]:
    """One chat completion at temperature 0. Raises ServiceError with the engine's own words."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with _open(request, timeout=timeout) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        words = error.read(2000).decode("utf-8", "replace")
        raise ServiceError(f"The engine answered {error.code}: {words}", where=url) from None
    except (OSError, ValueError) as error:
        raise ServiceError(f"The engine does not answer: {error}", where=url) from None
    return answer


def tokens_flow(url: str, model: str, timeout: float = 30.0) -> int:
    """Completion tokens of a one-token chat. Raises ServiceError when none comes."""
    answer = chat(url, model, [{"role": "user", "content": "ping"}], max_tokens=1, timeout=timeout)
    tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
    if tokens < 1:
        raise ServiceError("The engine answers without producing a token.", where=url)
    return tokens


def in_flight(url: str, timeout: float = 2.0) -> int | None:
    """Requests that run or wait in the engine; None when it does not say."""
    try:
        with _open(f"{url}/metrics", timeout=timeout) as response:
            text = response.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return None
    values = _BUSY.findall(text)
    return int(sum(map(float, values))) if values else None
