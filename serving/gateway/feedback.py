"""POST /v1/feedback: a thumb, an edited answer or a comment about one response.

In: ``{"response_id", "thumb": "up" | "down", "edit", "comment"}``, at least one of the last three.
Out: 200 once the record is on the disk (resources/feedback.py), masked like the request log. The
response must be one of the caller's tenant; an id that nobody has and one of somebody else get the
same answer. Sending again is safe: the last word of a key counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from starlette.types import Receive, Scope, Send

from contracts.records import FeedbackRecord
from resources import feedback, requests
from resources.requests import RESPONSE_ID
from serving.gateway.auth import Authenticator, Principal
from serving.gateway.body import Disconnected, read_body
from serving.gateway.envelope import ApiError
from serving.gateway.masking import masked
from serving.gateway.metrics import Metrics
from serving.gateway.responses import error_response, json_response
from serving.gateway.strict_json import read_object

log = logging.getLogger("ratchet.gateway.feedback")
BODY_BYTES, BODY_SECONDS = 128 << 10, 10.0
#: Records of one key about one response that a worker takes: a client that repeats itself for ever
#: must not fill the disk.
WORDS = 20
#: Responses that are remembered; older ones are looked for in the request log.
REMEMBERED = 20_000
#: Look-ups and writes at a time: they read files.
AT_A_TIME = 4
#: Requests that may wait for one of them.
WAITING = 64


class Feedback(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    response_id: Annotated[str, StringConstraints(max_length=64)]
    thumb: Literal["up", "down"] | None = None
    edit: Annotated[str, StringConstraints(max_length=20_000)] = ""
    comment: Annotated[str, StringConstraints(max_length=4_000)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> Feedback:
        if self.thumb is None and not self.edit.strip() and not self.comment.strip():
            raise ValueError("a thumb, an edit or a comment is needed")
        return self


class FeedbackEndpoint:
    """A plain ASGI application.

    Args:
        authenticator: says who asks.
        home: ``resources.feedback.folder(settings)``.
        requests_dir: the request log, for responses that are not remembered.
        metrics: counts what was stored.
    """

    def __init__(
        self, authenticator: Authenticator, home: Path, requests_dir: Path, metrics: Metrics
    ) -> None:
        self._authenticator, self._metrics = authenticator, metrics
        self._home, self._requests_dir = home, requests_dir
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._words: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._working = 0

    def note(self, response_id: str, tenant: str) -> None:
        """A response went out: feedback about it needs no look into the log."""
        self._owners[response_id] = tenant
        if len(self._owners) > REMEMBERED:
            self._owners.popitem(last=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            principal = self._authenticator.authenticate(scope["headers"])
            if self._working >= WAITING:
                raise ApiError("overloaded", "Too much feedback is on its way.")
            self._working += 1
            try:
                raw = await read_body(scope, receive, BODY_BYTES, BODY_SECONDS)
                given = _parse(raw)
                async with self._turns:
                    await self._store(given, principal)
            finally:
                self._working -= 1
            response = json_response({"object": "feedback", "response_id": given.response_id})
        except Disconnected:
            return
        except ApiError as error:
            response = error_response(error)
        except Exception as error:  # its message may hold what a person wrote
            log.error("feedback failed: %s", type(error).__name__)
            problem = ApiError("internal_error", "The feedback was not stored; send it again.")
            response = error_response(problem)
        await response(scope, receive, send)

    async def _store(self, given: Feedback, principal: Principal) -> None:
        owner = self._owners.get(given.response_id)
        if owner is None and RESPONSE_ID.fullmatch(given.response_id):
            owner = await asyncio.to_thread(requests.owner, self._requests_dir, given.response_id)
        if not owner or owner != principal.tenant:
            raise ApiError("not_found", "There is no such response.", "response_id")
        whose = (given.response_id, principal.key_id)
        words = self._words[whose] = self._words.pop(whose, 0) + 1
        if len(self._words) > REMEMBERED:
            self._words.popitem(last=False)
        if words > WORDS:
            raise ApiError("rate_limit_exceeded", "There was enough feedback on this response.")
        await asyncio.to_thread(self._write, given, principal)
        self._metrics.feedback.labels(given.thumb or "none").inc()

    def _write(self, given: Feedback, principal: Principal) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = FeedbackRecord(
            response_id=given.response_id,
            tenant=principal.tenant,
            key_id=principal.key_id,
            time=now,
            thumb=given.thumb,
            edit=masked(given.edit),
            comment=masked(given.comment),
        )
        feedback.append(self._home, record)


def _parse(raw: bytes) -> Feedback:
    """Raises ApiError invalid_json or invalid_request; what was sent is never repeated."""
    try:
        return Feedback.model_validate(read_object(raw))
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = place if place in Feedback.model_fields else ""
        what = first["msg"].removeprefix("Value error, ")
        where = f"'{known}': " if known else ""
        raise ApiError("invalid_request", f"{where}{what}.", known or None) from None
