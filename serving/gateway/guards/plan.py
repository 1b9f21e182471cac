"""A policy made ready: which recogniser's findings belong to which guard, and what versions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from contracts.digests import text_sha
from serving.gateway.guards.policy import (
    Guard,
    GuardPolicy,
    InjectionGuard,
    LeakGuard,
    PassagesGuard,
    PiiGuard,
    PresidioConfig,
    SchemaGuard,
    SecretsGuard,
)
from serving.gateway.guards.stream import Rules

_HERE = Path(__file__).parent
_RECOGNISERS = _HERE.parents[2] / "resources" / "recognisers"
_SOURCES = {
    "pii": (_RECOGNISERS / "pii.py", _HERE / "patterns.py"),
    "secrets": (_RECOGNISERS / "secrets.py", _HERE / "patterns.py"),
    "injection": (_HERE / "rules.py", _HERE / "injection.py", _HERE / "normalise.py"),
    "passages": (
        _HERE / "rules.py", _HERE / "injection.py", _HERE / "normalise.py", _HERE / "passages.py",
    ),
    "leak": (_HERE / "leak.py", _HERE / "normalise.py"),
    "schema": (_HERE / "schema.py",),
}  # fmt: skip


@functools.cache
def version(guard: str) -> str:
    """``pii@1f2e3d4c``: follows from the code of the rules, so nobody can forget to raise it."""
    digest = sha256()
    for file in _SOURCES[guard]:
        digest.update(file.read_bytes())
    return f"{guard}@{digest.hexdigest()[:8]}"


@dataclass(slots=True)
class Part:
    """The guards that stand at one place: in the path, or after it."""

    pii: PiiGuard | None = None
    secrets: SecretsGuard | None = None
    injection: InjectionGuard | None = None
    leak: LeakGuard | None = None
    schema: SchemaGuard | None = None
    rules: Rules = field(default_factory=Rules)

    def __bool__(self) -> bool:
        return any((self.pii, self.secrets, self.injection, self.leak, self.schema))

    @property
    def patterns(self) -> list[Guard]:
        return [guard for guard in (self.pii, self.secrets) if guard]

    @property
    def presidio(self) -> bool:
        return self.pii is not None and self.pii.engine == "presidio"

    @property
    def changes(self) -> bool:
        """Whether texts that cannot be read have to be refused."""
        return any(guard.enforced for guard in (self.pii, self.secrets, self.injection) if guard)


class Plan:
    """One policy: its parts by side and place, and a version that a cache key can hold.

    ``presidio``: what guards with this engine find, as kinds of findings, follows from it.
    """

    def __init__(self, policy: GuardPolicy, presidio: PresidioConfig | None = None) -> None:
        given, back = policy.input, policy.output
        entities = [name.lower() for name in presidio.entities] if presidio else []
        asked = any(guard and guard.engine == "presidio" for guard in (given.pii, back.pii))
        self.input, self.input_later = _parts(
            {"pii": given.pii, "secrets": given.secrets, "injection": given.injection}, entities
        )
        self.output, self.output_later = _parts(
            {"pii": back.pii, "secrets": back.secrets, "leak": back.leak, "schema": back.schema_},
            entities,
        )
        self.passages: PassagesGuard | None = given.passages
        names = {*_SOURCES}
        self.version = text_sha(
            policy.model_dump_json(by_alias=True)
            + (presidio.model_dump_json() if presidio and asked else "")
            + "".join(version(n) for n in sorted(names))
        )[:16]


def _parts(
    guards: Mapping[str, Guard | None], entities: Sequence[str]
) -> tuple[Part | None, Part | None]:
    """(in the path, later); None where there is nothing to do."""
    parts = Part(), Part()
    for name, guard in guards.items():
        if guard:
            part = parts[0] if guard.in_path else parts[1]
            setattr(part, name, guard)
            for kind in _kinds(guard, entities):
                part.rules[kind] = (name, guard, version(name))
    return parts[0] or None, parts[1] or None


def _kinds(guard: Guard, entities: Sequence[str]) -> Iterable[str]:
    if isinstance(guard, PiiGuard):
        return [*sorted(guard.kinds), *(entities if guard.engine == "presidio" else ())]
    if isinstance(guard, SecretsGuard):
        return sorted(guard.kinds)
    return ("system_prompt", "canary") if isinstance(guard, LeakGuard) else ()
