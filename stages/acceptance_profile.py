"""What of a knowledge base is compared with the version before: counts and distributions.

In: documents and chunks. Out: a profile of a few kilobytes; and, for two of
them, a row for each comparison, shaped like those of stages/expectations.py.

A distribution has shifted when two things hold at once. The Jensen-Shannon distance (base 2: 0 is
the same, 1 is disjoint) reaches ``acceptance.max_shift``: a hundred thousand chunks make any
difference significant, so significance alone would stop every edit. And a G-test over the counts
gives p < 0.001: thirty documents are never distributed quite like thirty others. PSI >= 0.1 flags
38 % of equal samples of 200 (measured: shared research notes), a bare KS test the opposite end.
Only sources that both versions have are compared: a new source is no shift.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from contracts.params import Acceptance

Row = dict[str, Any]
Counts = Mapping[str, int]

P_VALUE = 0.001
#: Documents that any source may lose: of ten, one is 10 %.
FEW = 3
#: Expected count that a bin needs in both versions; smaller ones are pooled (Cochran's rule).
MIN_EXPECTED = 5.0
DISTRIBUTIONS = {
    "lengths": "characters of a document",
    "tokens": "tokens of a chunk",
    "languages": "languages",
}


def profile(documents: list[Row], chunks: list[Row], max_tokens: int, strategy: str) -> Row:
    """Counts and histograms by source; the same documents and chunks give the same profile."""
    sources: dict[str, Row] = {}
    for row in documents:
        source = sources.setdefault(row["source"], _empty())
        source["documents"] += 1
        source["lengths"][str(int(math.log2(max(1, len(row["text"])))))] += 1
        if row["language"] and row["format"] != "code":
            source["languages"][row["language"]] += 1
    for row in chunks:
        source = sources.setdefault(row["source"], _empty())
        source["chunks"] += 1
        source["tokens"][str(8 * (row["tokens"] - 1) // max_tokens)] += 1
    return {
        "chunking": {"max_tokens": max_tokens, "strategy": strategy},
        "sources": {
            name: {
                key: dict(value) if isinstance(value, Counter) else value
                for key, value in found.items()
            }
            for name, found in sorted(sources.items())
        },
    }


def _empty() -> Row:
    return {"documents": 0, "chunks": 0} | {name: Counter() for name in DISTRIBUTIONS}


def compare(before: Row | None, now: Row, policy: Acceptance) -> list[Row]:
    """The comparisons with the last accepted version; none if there is no such version."""
    if before is None:
        return []
    rows = [
        _count_row(name, before["sources"][name]["documents"], _documents(now, name), policy)
        for name in sorted(before["sources"])
    ]
    shared = sorted(set(before["sources"]) & set(now["sources"]))
    same_chunking = before["chunking"] == now["chunking"]
    for key, words in DISTRIBUTIONS.items():
        if key == "tokens" and not same_chunking:
            continue  # params.chunks changed: every chunk is another, and that is no surprise
        old, new = pooled(before, shared, key), pooled(now, shared, key)
        rows.append(_shift_row(words, old, new, policy))
    was, are = (
        {name: int(value["sources"][name]["documents"]) for name in shared}
        for value in (before, now)
    )
    rows.append(_shift_row("shares of the sources", was, are, policy))
    return rows


def _documents(value: Row, source: str) -> int:
    return int(value["sources"].get(source, {"documents": 0})["documents"])


def pooled(value: Row, sources: Iterable[str], key: str) -> Counter[str]:
    """One histogram over several sources."""
    total: Counter[str] = Counter()
    for name in sources:
        total.update(value["sources"][name][key])
    return total


def _count_row(source: str, old: int, new: int, policy: Acceptance) -> Row:
    lost, won = max(0, old - new), max(0, new - old)
    fine = (lost <= FEW or lost <= policy.max_loss * old) and (
        won <= FEW or won <= policy.max_growth * old
    )
    if new == 0:
        fine = False
    return {
        "expectation": f"{source} lost at most {policy.max_loss:.0%} of its documents and grew by "
        f"at most {policy.max_growth:.0%}",
        "rule": "row_count_delta",
        "over": "last accepted",
        "column": source,
        "bound": {"max_loss": policy.max_loss, "max_growth": policy.max_growth, "few": FEW},
        "observed": f"{old:,} before, {new:,} now",
        "success": fine,
    }


def _shift_row(words: str, old: Counts, new: Counts, policy: Acceptance) -> Row:
    distance, p = js_distance(old, new), g_test(old, new)
    shifted = distance >= policy.max_shift and p < P_VALUE
    return {
        "expectation": f"{words} are distributed as before",
        "rule": "jensen_shannon_and_g_test",
        "over": "last accepted",
        "column": None,
        "bound": {"max_shift": policy.max_shift, "p": P_VALUE},
        "observed": f"distance {distance:.3f} of at most {policy.max_shift}, p = {p:.2g}",
        "shift": round(distance, 6),
        "success": not shifted,
    }


def js_distance(old: Counts, new: Counts) -> float:
    """Jensen-Shannon distance, base 2, of two histograms; 0 if one of them is empty."""
    n, m = sum(old.values()), sum(new.values())
    if not n or not m:
        return 0.0
    divergence = 0.0
    for key in set(old) | set(new):
        p, q = old.get(key, 0) / n, new.get(key, 0) / m
        middle = (p + q) / 2
        divergence += sum(v * math.log2(v / middle) for v in (p, q) if v) / 2
    return math.sqrt(max(0.0, divergence))


def g_test(old: Counts, new: Counts) -> float:
    """p of the hypothesis that both histograms are drawn alike; 1 where too little is counted."""
    from scipy.special import chdtrc

    n, m = sum(old.values()), sum(new.values())
    if not n or not m:
        return 1.0
    cells: list[tuple[int, int]] = []
    rest = (0, 0)
    for key in sorted(set(old) | set(new)):
        pair = (old.get(key, 0), new.get(key, 0))
        if sum(pair) * min(n, m) / (n + m) >= MIN_EXPECTED:
            cells.append(pair)
        else:
            rest = (rest[0] + pair[0], rest[1] + pair[1])
    if sum(rest):
        cells.append(rest)
    if len(cells) < 2:
        return 1.0
    statistic = 0.0
    for pair in cells:
        for seen, total in zip(pair, (n, m), strict=True):
            if seen:
                statistic += 2 * seen * math.log(seen * (n + m) / (sum(pair) * total))
    return float(chdtrc(len(cells) - 1, max(0.0, statistic)))
