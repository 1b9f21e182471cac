"""One request from its arrival to its record: what was asked, found, answered, and how it ended.

The handler fills an Exchange as it goes; whatever happens, ``finish`` turns it into metrics and one
row of the request log. So a failure, a disconnect and an answer are told in the same way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Literal

from contracts.records import Passage
from resources import rag
from resources.requests import new_response_id
from serving.gateway.api_request import Kind
from serving.gateway.auth import Principal
from serving.gateway.envelope import ApiError
from serving.gateway.guards.verdict import Verdict
from serving.gateway.limits import Lease
from serving.gateway.live import Live
from serving.gateway.metrics import Metrics
from serving.gateway.prompt_choice import Choice
from serving.gateway.telemetry.spans import Trace

#: No engine counts as many; the log's columns have 64 bits.
MAX_TOKENS = 1 << 53
_STRICTNESS = ("allow", "flag", "redact", "block")


@dataclass
class Exchange:
    """Mutable on purpose and owned by one handler."""

    channel: str  # "" for a plain model
    kind: Kind = "chat"
    arrived: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)
    response_id: str = ""
    live: Live | None = None
    choice: Choice | None = None  # of the release's prompt
    rollout: str = ""  # of the channel's candidate, while there is one
    arm: Literal["", "stable", "candidate", "shadow"] = ""  # of that rollout
    moved: bool = False  # the candidate failed, and the stable release answered
    question: str = ""
    stream: bool = False
    passages: list[Passage] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    refused_by: str = ""  # gateway: no passage was near enough; model: its answer says so
    error: ApiError | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    retrieval_ms: float | None = None
    principal: Principal | None = None  # None: nobody that we know
    model: str = ""  # the logical model
    session: str = ""
    feature: str = ""
    provider: str = ""
    tier: str = ""
    attempts: int = 0  # at upstreams
    cost: float = 0.0
    cached: str = ""  # exact, semantic
    tokens_estimated: bool = False
    guard: str = "allow"  # the strictest thing that a guard did
    verdicts: list[Verdict] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    more_headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.response_id = self.response_id or new_response_id(self.arrived)

    @property
    def text(self) -> str:
        """The answer so far, fit for UTF-8."""
        return "".join(self.answer).encode("utf-8", "replace").decode("utf-8")

    @property
    def release(self) -> str:
        return self.live.release if self.live else ""

    @property
    def prompt_version(self) -> str:
        """What the release's prompt is rendered from; "" for a plain model."""
        if self.choice is not None:
            return self.choice.version
        return self.live.prompt_version if self.live else ""

    @property
    def exposed(self) -> bool:
        """Whether the client has words that a model wrote with the chosen prompt."""
        return self.choice is not None and bool(self.answer) and self.refused_by != "gateway"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every response to this request carries."""
        found = [
            (b"x-request-id", self.response_id.encode()),
            (b"x-ratchet-response-id", self.response_id.encode()),
        ]
        if self.live:
            found.append((b"x-ratchet-release", self.live.release.encode()))
            found.append((b"x-ratchet-prompt", self.prompt_version.encode()))
        return found + self.more_headers

    def limits(self, lease: Lease) -> None:
        """What the key has left goes into the response's headers."""
        self.more_headers += lease.headers()

    def judged(self, verdict: Verdict) -> None:
        """Note what guards said; the strictest word stays."""
        if verdict.findings or verdict.failures or verdict.error:
            self.verdicts.append(verdict)
            if _STRICTNESS.index(verdict.action) > _STRICTNESS.index(self.guard):
                self.guard = verdict.action

    def first_text(self) -> None:
        """Note the time of the engine's first text, once."""
        if self.ttft_ms is None and self.refused_by != "gateway":
            self.ttft_ms = self._elapsed_ms()

    def usage(self, usage: dict[str, Any] | None) -> None:
        """Note the engine's count of tokens."""
        for name in ("prompt_tokens", "completion_tokens"):
            value = (usage or {}).get(name)
            if type(value) is int and 0 <= value < MAX_TOKENS:
                setattr(self, name, value)

    def finish(self, metrics: Metrics, salt: bytes) -> dict[str, Any]:
        """Count what happened; return the log's row, with the fields of RequestRecord. ``salt``
        keys the hash of the session's name."""
        text = self.text if self.answer else ""
        if self.live is not None:
            self._finish_release(text, metrics)
        return self._row(text, salt)

    def _finish_release(self, text: str, metrics: Metrics) -> None:
        """What only answers from documents have."""
        if not self.refused_by and self.error is None and rag.is_refusal(text):
            self.refused_by = "model"
        if self.refused_by:
            metrics.refusals.labels(self.refused_by).inc()
        metrics.unknown_citations.inc(len(rag.unresolved(text, self.passages)))
        if self.arm:
            metrics.arms.labels(self.arm, self._outcome()).inc()

    def _outcome(self) -> str:
        """Of a request of a rollout's arm."""
        if self.error is not None:
            return self.error.code
        return "moved" if self.moved else "ok"

    def _row(self, text: str, salt: bytes) -> dict[str, Any]:
        live, who, error = self.live, self.principal, self.error
        return {
            "response_id": self.response_id,
            "time": self.arrived.isoformat(timespec="milliseconds")[:-6] + "Z",
            "channel": self.channel,
            "release": live.release if live else "",
            "model": live.channel.model if live else "",
            "prompt_version": self.prompt_version if live else "",
            "question": self.question,
            "answer": text,
            "refused": bool(self.refused_by),
            "stream": self.stream,
            "status": error.status if error else 200,
            "error": error.code if error else None,
            "chunk_ids": [passage.chunk_id for passage in self.passages],
            "cited": rag.resolved(text, self.passages) if self.passages else [],
            "scores": [passage.score for passage in self.passages],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_ms": self.ttft_ms,
            "latency_ms": self._elapsed_ms(),
            "retrieval_ms": self.retrieval_ms,
            "kind": self.kind,
            "asked_model": self.model,
            "tenant": who.tenant if who else "",
            "key_id": who.key_id if who else "",
            "feature": self.feature,
            "session": _hashed(self.session, salt) if self.session else "",
            "provider": self.provider,
            "tier": self.tier,
            "cost": self.cost,
            "cached": self.cached,
            "tokens_estimated": self.tokens_estimated,
            "attempts": self.attempts,
            "guard": self.guard,
            "prompt_experiment": self.choice.experiment if self.choice and self.exposed else "",
            "rollout": self.rollout,
            "arm": self.arm,
        }

    def _elapsed_ms(self) -> float:
        return round((time.perf_counter() - self.clock) * 1000, 3)


def _hashed(session: str, salt: bytes) -> str:
    """A session's name may be a person's."""
    return blake2b(session.encode("utf-8", "replace"), key=salt[:64], digest_size=12).hexdigest()
