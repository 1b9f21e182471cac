"""How busy an engine says it is, read from its Prometheus metrics.

All names stand in ALIASES, newest first; a test holds the first ones against the installed vLLM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What we want to know -> the names under which versions of vLLM tell it.
ALIASES: dict[str, tuple[str, ...]] = {
    "waiting": ("vllm:num_requests_waiting",),
    "running": ("vllm:num_requests_running",),
}
_PATTERNS = {
    key: [
        re.compile(rf"^{re.escape(name)}(?:\{{[^\n]*\}})?[ \t]+([0-9.eE+-]+)".encode(), re.M)
        for name in names
    ]
    for key, names in ALIASES.items()
}


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in one engine, over all of its ranks."""

    waiting: float
    running: float

    @property
    def requests(self) -> float:
        return self.waiting + self.running


def parse(text: bytes) -> Load | None:
    """The load in a page of metrics; None when a name is not there."""
    found: dict[str, float] = {}
    for key, patterns in _PATTERNS.items():
        for pattern in patterns:
            values = pattern.findall(text)
            if values:
                try:
                    found[key] = sum(map(float, values))
                except ValueError:
                    return None
                break
        else:
            return None
    return Load(found["waiting"], found["running"])
