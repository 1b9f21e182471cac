"""Read YAML the way DVC writes it: version 1.2, core schema.

In: text of ``dvc.lock``. Out: plain Python values. Why: DVC writes with ruamel (YAML 1.2), where
``1e-05`` is a number and ``on`` a string; PyYAML reads YAML 1.1, where it is the other way round,
and a parameter would look changed for ever. PyYAML stays the reader because it is already loaded
by Dagster and has a C scanner (a lock of 16 stages: 4 ms).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """A safe loader that resolves plain scalars by the 1.2 core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:timestamp",
    re.compile(
        r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
        r"|^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}"
        r"(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::?[0-9]{2})?))?$"
    ),
    list("0123456789"),
)


def _construct_int(loader: Any, node: Any) -> int:
    """Decimal unless it says ``0o`` or ``0x``: ``010`` is ten in 1.2 and eight in 1.1."""
    text = loader.construct_scalar(node)
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.lstrip("+"))
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return sign * int(digits[2:] if base != 10 else digits, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def loads(text: str | bytes) -> Any:
    """Parse one document.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    return yaml.load(text, Loader=_Loader)


def stage_lines(text: str) -> dict[str, int]:
    """Where each stage starts: name → line number in ``dvc.yaml`` (from 1). {} if unreadable."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return {}
    for key, value in getattr(node, "value", ()):
        if key.value == "stages" and isinstance(value, yaml.MappingNode):
            return {str(k.value): int(k.start_mark.line) + 1 for k, _ in value.value}
    return {}
