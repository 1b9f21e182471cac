"""What differs between two releases: members by digest, parameters, prompt text, gate, model.

Pure but for :func:`prompt_texts`, which reads installed copies.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from contracts.errors import RatchetError
from contracts.records import Release
from contracts.settings import Settings
from resources import releases

Kind = Literal["member", "param", "prompt", "model", "gate", "commit"]


@dataclass(frozen=True)
class Change:
    """One difference. ``None`` on a side: that release does not have it."""

    kind: Kind
    name: str
    before: Any
    after: Any


def diff(before: Release, after: Release) -> list[Change]:
    """Everything that differs, in the order of the release file; nothing for equal ids."""
    found = _compared(
        "member",
        {name: member.md5 for name, member in before.members.items()},
        {name: member.md5 for name, member in after.members.items()},
    )
    found += _compared("prompt", before.prompt, after.prompt)
    found += _compared("model", dict(_flat(before.model)), dict(_flat(after.model)))
    found += _compared("gate", dict(_flat(before.gate)), dict(_flat(after.gate)))
    found += _compared("param", dict(_flat(before.params)), dict(_flat(after.params)))
    found += _compared("commit", {"git": before.git_commit}, {"git": after.git_commit})
    return found


def prompt_texts(before: Release, after: Release, settings: Settings) -> list[str]:
    """A unified diff of the two prompt templates, empty when equal or not installed here."""
    texts = []
    for release in (before, after):
        try:
            texts.append(releases.load(settings, release.id).prompt().text)
        except RatchetError:
            return []
    one, two = (f"{r.prompt['name']}/{r.prompt['version']} ({r.id})" for r in (before, after))
    lines = difflib.unified_diff(
        texts[0].splitlines(), texts[1].splitlines(), one, two, lineterm=""
    )
    return list(lines)


def as_json(changes: list[Change]) -> list[dict[str, Any]]:
    return [asdict(change) for change in changes]


def _compared(kind: Kind, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    names = list(before) + [name for name in after if name not in before]
    return [
        Change(kind, name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names; lists are one value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
