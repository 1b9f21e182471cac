"""Counters and histograms of the event loop: plain sums that become metrics when they are scraped.

prometheus_client takes a lock and makes several calls for each count, 1 us for a counter and 2 us
for a histogram, and a request counts fifteen times. What only the event loop counts needs neither:
an addition takes 0.1 us. These have the methods of its classes that the gateway uses, so that
whoever counts need not know. Counting from another thread may lose a count.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Sum:
    """One counter, or one combination of label values."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


class Counts:
    """One histogram, or one combination of label values. ``counts`` has one place more than
    ``bounds``: what is above all of them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def time(self) -> Timing:
        """Use as ``with``: observes the seconds inside, however they end."""
        return Timing(self)


class Timing:
    """See Counts.time."""

    __slots__ = ("_began", "_counts")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._counts.observe(time.perf_counter() - self._began)


class LoopCounter(Collector):
    """A counter. ``name`` is without ``_total``."""

    _type = "counter"  # as prometheus_client's own classes say it

    def __init__(
        self, name: str, what: str, labels: Sequence[str] = (), *, registry: CollectorRegistry
    ) -> None:
        self._name, self._what, self._labelnames = name, what, tuple(labels)
        self._children: dict[tuple[str, ...], Sum] = {}
        if not labels:
            self.labels()  # it is there before it counts
        registry.register(self)

    def labels(self, *values: str) -> Sum:
        """The counter with these values, in the labels' order."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = Sum()
        return child

    def inc(self, amount: float = 1) -> None:
        """Count, without labels."""
        self._children[()].inc(amount)

    def describe(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._what, labels=self._labelnames)]

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._what, labels=self._labelnames)
        for values, child in list(self._children.items()):
            family.add_metric(values, child.value)
        return [family]


class LoopHistogram(Collector):
    """A histogram; ``buckets`` are upper bounds, ascending, without infinity."""

    _type = "histogram"

    def __init__(
        self,
        name: str,
        what: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._what, self._labelnames = name, what, tuple(labels)
        self._bounds = tuple(map(float, buckets))
        self._children: dict[tuple[str, ...], Counts] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Counts:
        """The histogram with these values, in the labels' order."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = Counts(self._bounds)
        return child

    def observe(self, value: float) -> None:
        """Count, without labels."""
        self._children[()].observe(value)

    def describe(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._what, labels=self._labelnames)]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._what, labels=self._labelnames)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, child in list(self._children.items()):
            below, buckets = 0, []
            for name, count in zip(names, child.counts, strict=True):
                below += count
                buckets.append((name, float(below)))
            family.add_metric(values, buckets, child.total)
        return [family]
