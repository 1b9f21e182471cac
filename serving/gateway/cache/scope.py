"""Which requests may share an answer: the key of the cache.

Everything that an answer may depend on is in the key: who the tenant is, what answers, with which
prompt and which guards, and every field of the body. It is one JSON array, so no text can pretend
to be the end of the field before it, and a hash of it, so no text stands in a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import orjson

from serving.gateway.api_request import ApiRequest, Kind
from serving.gateway.cache.config import Exact
from serving.gateway.routing.config import LogicalModel

_SORTED = orjson.OPT_SORT_KEYS
#: 160 bits: no two requests are found that share a key.
KEY_BYTES = 20


@dataclass(slots=True)
class Scope:
    """A request as the cache sees it.

    Attributes:
        bypass: why it is neither looked up nor kept; "" when it is.
        answers: how many answers one body holds.
    """

    key: bytes
    tenant: str
    model: str
    target: str
    kind: Kind
    stream: bool
    answers: int
    bypass: str
    parts: tuple[str, str, str, str, str, str, bool, bool]
    request: ApiRequest


def scope(
    request: ApiRequest,
    config: Exact,
    *,
    tenant: str,
    target: str,
    prompt: str = "",
    guard: str = "",
    personal: bool = False,
    temperature: float = 1.0,
) -> Scope:
    """The scope of a request as it would go upstream: after guards changed it, before routing.

    Args:
        tenant: whose request it is; "" is an error, for an entry without an owner is everybody's.
        target: what answers, see :func:`target_of`; of a release, its id and what is hidden of its
            documents right now.
        prompt: version of the gateway's own prompt; "" where the client's messages go through.
        guard: ``Guards.version(policy)``.
        personal: the key's policy says that its answers are personal.
        temperature: what the engine takes when the body names none.

    Raises ValueError without a tenant or a target.
    """
    if not tenant:
        raise ValueError("a cache scope without a tenant would be shared by all of them")
    if not target:
        raise ValueError("a cache scope without a target would outlive the model that answered")
    body = request.body
    parts = (
        tenant, request.model, target, prompt, guard, request.kind, request.stream,
        request.include_usage,
    )  # fmt: skip
    bypass, key = "", b""
    if not config.enabled:
        bypass = "off"
    elif personal:
        bypass = "personal"
    elif (
        not config.any_sampling
        and request.kind != "embeddings"
        and body.get("temperature", temperature) > 0
        and "seed" not in body
    ):
        bypass = "sampling"
    elif body.get("tools") or (request.kind == "chat" and _of_tools(body["messages"])):
        bypass = "tools"
    else:
        try:
            text = orjson.dumps((parts, body), option=_SORTED)
            key = blake2b(text, digest_size=KEY_BYTES).digest()
        except TypeError:  # numbers beyond 64 bits
            bypass = "unhashable"
    return Scope(
        key, tenant, request.model, target, request.kind, request.stream,
        request.n * request.prompts, bypass, parts, request,
    )  # fmt: skip


def target_of(model: LogicalModel, urls: dict[str, str]) -> str:
    """What a plain model answers with: all of its candidates, wherever routing would send it.

    Args:
        urls: address of each provider. Worked out once a configuration, not once a request.
    """
    candidates = [
        [one.provider, urls[one.provider], one.model, one.weight, one.tier]
        for one in model.candidates
    ]
    text = orjson.dumps(
        [model.name, model.policy, model.tiers, model.defaults, sorted(candidates, key=repr)],
        option=_SORTED,
    )
    return f"{model.name}@{blake2b(text, digest_size=8).hexdigest()}"


def tag(text: str) -> str:
    """A name without separators for part of a store's key."""
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _of_tools(messages: list[dict[str, object]]) -> bool:
    return any(
        message["role"] in ("tool", "function") or message.get("tool_calls") for message in messages
    )
