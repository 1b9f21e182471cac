"""What the guards do, by name: the block ``guards`` of the gateway's configuration.

A guard that a policy does not name does nothing and costs nothing. ``mode`` says where it stands:
``enforce`` acts, ``observe`` looks and only reports, ``async`` looks when the answer is on its way.
``action`` says what it does with a finding: ``block`` ends the request, ``redact`` replaces the
text, ``flag`` reports. ``budget_ms`` is how long a request waits for it, and ``on_timeout`` whether
the request then goes on (``open``) or ends with guard_unavailable (``closed``).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Mode = Literal["enforce", "observe", "async"]
Action = Literal["block", "redact", "flag"]
Fail = Literal["open", "closed"]
PiiKind = Literal["email", "phone", "card", "iban", "ssn", "ip"]
SecretKind = Literal["private_key", "api_key"]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Guard(_Closed):
    """What every guard has."""

    mode: Mode = "enforce"
    action: Action = "flag"
    budget_ms: float = Field(default=100.0, gt=0, le=60_000)
    on_timeout: Fail = "open"

    @property
    def in_path(self) -> bool:
        return self.mode != "async"

    @property
    def enforced(self) -> bool:
        """Whether a finding changes or ends the request."""
        return self.mode == "enforce" and self.action != "flag"

    @model_validator(mode="after")
    def _what_happened_is_past(self) -> Self:
        if self.mode == "async" and self.action != "flag":
            raise ValueError("a guard in mode async comes too late to act: its action is flag")
        return self


class PiiGuard(Guard):
    """Personal data. ``presidio`` adds names and places to what patterns find."""

    action: Action = "redact"
    on_timeout: Fail = "closed"
    kinds: frozenset[PiiKind] = frozenset(("email", "phone", "card", "iban", "ssn", "ip"))
    engine: Literal["patterns", "presidio"] = "patterns"


class SecretsGuard(Guard):
    action: Action = "block"
    on_timeout: Fail = "closed"
    kinds: frozenset[SecretKind] = frozenset(("private_key", "api_key"))


class InjectionGuard(Guard):
    """``threshold``: what a text's hits must be worth together (rules.py)."""

    action: Literal["block", "flag"] = "block"
    threshold: int = Field(default=2, ge=1, le=9)


class PassagesGuard(Guard):
    """``redact`` takes the instructions out of a passage, ``block`` leaves the passage out."""

    action: Action = "redact"
    threshold: int = Field(default=2, ge=1, le=9)


class LeakGuard(Guard):
    """``words``: so many words of the system prompt in a row are a leak; 0 looks for canaries
    alone."""

    action: Action = "block"
    words: int = Field(default=16, ge=0, le=64)

    @field_validator("words")
    @classmethod
    def _not_everyday(cls, value: int) -> int:
        if 0 < value < 6:
            raise ValueError("fewer than 6 words in a row are everyday language; use 0 or 6 to 64")
        return value


class SchemaGuard(Guard):
    action: Literal["block", "flag"] = "flag"


class InputGuards(_Closed):
    pii: PiiGuard | None = None
    secrets: SecretsGuard | None = None
    injection: InjectionGuard | None = None
    passages: PassagesGuard | None = None


class OutputGuards(_Closed):
    pii: PiiGuard | None = None
    secrets: SecretsGuard | None = None
    leak: LeakGuard | None = None
    schema_: SchemaGuard | None = Field(default=None, alias="schema")


class GuardPolicy(_Closed):
    input: InputGuards = InputGuards()
    output: OutputGuards = OutputGuards()


class PresidioConfig(_Closed):
    """``model``: name or folder of a spaCy pipeline; Ratchet downloads none."""

    model: str
    language: str = "en"
    entities: tuple[str, ...] = ("PERSON", "LOCATION")
    min_score: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(default=1, ge=1, le=32)
    start_seconds: float = Field(default=120.0, gt=0)


class GuardsConfig(_Closed):
    """``canaries_env`` names the variable that holds strings which must never come out, divided by
    commas. ``later`` texts may wait for guards in mode async; more are dropped and counted."""

    policies: dict[str, GuardPolicy] = {}
    canaries_env: str = ""
    presidio: PresidioConfig | None = None
    later: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _presidio_is_configured(self) -> Self:
        wanted = [
            f"{name}.{side}.pii"
            for name, policy in self.policies.items()
            for side, guard in (("input", policy.input.pii), ("output", policy.output.pii))
            if guard and guard.engine == "presidio"
        ]
        if wanted and self.presidio is None:
            raise ValueError(
                f"{', '.join(wanted)}: engine presidio needs the block guards.presidio"
            )
        return self
