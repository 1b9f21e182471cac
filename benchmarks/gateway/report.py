"""The tables, and the targets with PASS or FAIL."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gateway.lanes import Results

COLUMNS = ("direct", "relay", "minimal", "governed", "full", "litellm-plain", "litellm-governed")


@dataclass(frozen=True)
class Target:
    """``figure`` of ``subject``, divided by that of ``against`` where there is one, compared with
    ``bound``."""

    text: str
    figure: str
    subject: str
    holds: Callable[[float, float], bool]
    bound: float
    against: str = ""

    def line(self, results: Results) -> tuple[bool | None, str]:
        figures = results.figures.get(self.figure, {})
        value = figures.get(self.subject)
        if value is not None and self.against:
            other = figures.get(self.against)
            value = value / other if other else None
        if value is None:
            return None, f"{'--':4}  {self.text}: not measured"
        good = self.holds(value, self.bound)
        return good, f"{'PASS' if good else 'FAIL'}  {self.text}: {value:.3f}"


_AT_LEAST, _AT_MOST = operator.ge, operator.le
_RATE = "requests/s 250B"
TARGETS = (
    *(
        Target(f"{lane}, requests/s against {other} >= {bound:g}", _RATE, lane, _AT_LEAST, bound,
               other)
        for lane, other, bound in (
            ("governed", "relay", 0.5), ("governed", "litellm-governed", 50),
            ("full", "relay", 0.25), ("full", "litellm-governed", 25),
        )
    ),
    *(
        Target(f"{lane}, added p{percent} <= {bound} ms", f"latency added p{percent} ms", lane,
               _AT_MOST, bound)
        for lane in ("governed", "full")
        for percent, bound in ((50, 1.0), (99, 3.0))
    ),
    *(
        Target(f"{lane}, added time to the first event p50 <= 1.5 ms", "ttft added p50 ms", lane,
               _AT_MOST, 1.5)
        for lane in ("governed", "full")
    ),
    Target("governed, SSE events/s >= 10,000", "SSE events/s", "governed", _AT_LEAST, 10_000),
    Target("governed, identical streams = 100 %", "streams identical %", "governed",
           _AT_LEAST, 100),
    Target("full, 100K tokens stall small streams for <= 50 ms",
           "longest stall beside 100K tokens ms", "full", _AT_MOST, 50),
    Target("full, RSS slope <= 1 MiB/min", "RSS slope MiB/min", "full", _AT_MOST, 1.0),
    *(
        Target(f"full, {name} back at the baseline", f"{name} after the soak, added", "full",
               _AT_MOST, 0)
        for name in ("descriptors", "ratchet_gateway_in_flight", "ratchet_gateway_leases",
                     "ratchet_gateway_tasks")
    ),
)  # fmt: skip


def show(results: Results) -> int:
    """Print everything. Returns the exit status."""
    names = [name for name in COLUMNS if any(name in row for row in results.figures.values())]
    print("\n" + " " * 44 + "".join(f"{name:>18}" for name in names))
    for figure, row in results.figures.items():
        cells = "".join(f"{row[name]:18.3f}" if name in row else f"{'':18}" for name in names)
        print(f"{figure:44}{cells}")
        if figure.startswith("requests/s"):
            _ratios(row, names)
    for where, note in results.notes.items():
        print(f"note: {where}: {note}")
    print()
    for text in results.failed:
        print(f"FAIL  {text}")
    failed = bool(results.failed)
    for target in TARGETS:
        good, line = target.line(results)
        failed |= good is False
        print(line)
    return int(failed)


def _ratios(row: dict[str, float], names: list[str]) -> None:
    for other in ("relay", "litellm-plain", "litellm-governed"):
        if row.get(other):
            cells = "".join(
                f"{row[name] / row[other]:18.3f}" if name in row else " " * 18 for name in names
            )
            print(f"{'    against ' + other:44}{cells}")
