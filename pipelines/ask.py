"""One question to the gateway, over HTTP like everybody else."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from contracts.errors import ServiceError
from contracts.settings import Settings

TIMEOUT = 120.0  # seconds: a cold engine on a busy laptop


def ask(question: str, settings: Settings, model: str = "ratchet") -> dict[str, Any]:
    """Returns {"answer", "citations", "response_id", "release", "usage"}.

    Raises:
        ServiceError: the gateway does not answer, or answers with an error.
    """
    url = f"{settings.gateway_url}/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            value = json.load(response)
            headers = response.headers
    except urllib.error.HTTPError as error:
        raise ServiceError(
            f"The gateway answered {error.code}: {_message(error.read())}",
            where=url,
            next="`ratchet status` shows what is serving",
        ) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ServiceError(
            f"The gateway does not answer: {getattr(error, 'reason', error)}",
            where=url,
            next="start it with `make up` (or `ratchet up`)",
        ) from None
    message = value["choices"][0]["message"]
    return {
        "answer": message["content"],
        "citations": value.get("citations", []),
        "response_id": headers["x-ratchet-response-id"],
        "release": headers["x-ratchet-release"],
        "usage": value.get("usage"),
    }


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def render(result: dict[str, Any]) -> str:
    """The answer as a terminal shows it."""
    lines = [result["answer"], ""]
    for item in result["citations"]:
        heading = f" > {item['heading']}" if item["heading"] else ""
        lines.append(f"  [{item['n']}] {item['path']}{heading}  ({item['start']}-{item['end']})")
    lines += ["", f"response {result['response_id']}   release {result['release']}"]
    lines.append(f"next: ratchet trace {result['response_id']}")
    return "\n".join(lines)
