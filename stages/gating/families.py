"""The families beside quality: safety, fairness, latency, resources.

In: the card, the profile's figures, the bundle's memory plan, the policy. Out: checks. Those that
come from one machine's clock and memory are marked ``measured``: their figures are evidence beside
the verdict and no part of it (decision 0005).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.policy import Policy
from contracts.records import Check, Word
from stages.gating.card import Card, Other
from stages.gating.quality import Found, tidy

#: Of one-sided bounds. Not shared with the quality looks: these are asked once.
LEVEL = 0.05


# -- safety --------------------------------------------------------------------------------------


def safety(card: Card, policy: Policy) -> Found:
    """Each suite: the share of prompts withstood, by its exact one-sided lower bound."""
    found = Found()
    for name, suite in policy.safety.suites.items():
        prompts = [key for key, item in card.safety.items() if item["suite"] == name]
        scores = card.candidate.get(f"safety_{name}", {})
        missing = [key for key in prompts if key not in scores]
        best = lower_bound(len(prompts), len(prompts))
        if best < suite.min:
            found.invalid(
                name,
                f"{name}: {len(prompts)} prompts can show {best:.3f} at the most, "
                f"the floor is {suite.min:g}",
                family="safety",
                change="more prompts of this suite in data/safety.yaml",
            )
            continue
        if len(missing) > policy.coverage.max_missing * len(prompts):
            found.invalid(
                name,
                f"{name}: {len(missing)} of {len(prompts)} prompts have no score: "
                f"{', '.join(missing[:5])}",
                family="safety",
                change="dvc repro --force answers, and read its log",
            )
            continue
        failed = [key for key in prompts if scores.get(key, 0.0) < 1.0]
        found.checks.append(_suite(name, len(prompts), failed, suite.min))
    return found


def _suite(name: str, n: int, failed: Sequence[str], floor: float) -> Check:
    passed = n - len(failed)
    low = lower_bound(passed, n)
    allowed = max((k for k in range(n + 1) if lower_bound(n - k, n) >= floor), default=0)
    shown = (
        f"{name}: {passed} of {n} prompts withstood; with 95 % confidence more than {low:.3f} of "
        f"such prompts are, the floor is {floor:g}"
    )
    if failed:
        shown += f"; failed: {', '.join(failed[:5])}{' ...' if len(failed) > 5 else ''}"
    else:
        shown += f" (no failure in {n}: under {1 - low:.1%} fail)"
    return Check(
        family="safety", name=name, outcome="PASS" if low >= floor else "FAIL", detail=shown,
        change=f"at {n} prompts {allowed} may fail, {len(failed)} did",
        value=tidy(passed / n), bound=floor, low=tidy(low), high=1.0, n=n,
        evidence={"method": "Clopper-Pearson, one-sided 95 %", "failed": list(failed)},
    )  # fmt: skip


def lower_bound(passed: int, n: int, level: float = LEVEL) -> float:
    """Clopper and Pearson's exact one-sided lower bound of a share; without a failure it is
    level ** (1 / n), about 1 - 3 / n: the rule of three."""
    from scipy.stats import beta

    return float(beta.ppf(level, passed, n - passed + 1)) if passed else 0.0


# -- fairness ------------------------------------------------------------------------------------


def fairness(card: Card, policy: Policy) -> Found:
    """Each slice: does some group score less than the others together, by more than allowed?"""
    found = Found()
    block = policy.fairness
    values = card.candidate.get(block.metric, {})
    asked = {name: item for name, item in card.questions.items() if name in values}
    for one in block.slices:
        groups: dict[str, list[float]] = {}
        for name, item in asked.items():
            group = group_of(one.by, item)
            if group is not None:
                groups.setdefault(group, []).append(values[name])
        large = {key: held for key, held in groups.items() if len(held) >= block.min_questions}
        if len(groups) < 2 or not large:
            found.notes.append(f"fairness by {one.by}: one group only, nothing to compare")
            continue
        found.checks.append(_gaps(one.by, groups, list(large), one.max_gap, block.metric))
    return found


def group_of(by: str, question: Mapping[str, Any]) -> str | None:
    """Which group of a slice a question belongs to."""
    document = question.get("document")
    if by == "document":
        return document
    if by == "kind":  # "<source>:<path>" or a path in this repository
        return None if document is None else str(document).split(":")[0].split("/")[0]
    text = str(question["question"]).strip()
    sentence = text[:1].isupper() and text.endswith(("?", ".")) and len(text.split()) > 4
    return "sentence" if sentence else "terse"


def _gaps(
    by: str, groups: Mapping[str, list[float]], names: Sequence[str], bound: float, metric: str
) -> Check:
    """The group that is furthest below the rest; every group's figures are in the evidence."""
    rows: list[dict[str, Any]] = []
    for name in sorted(names):
        rest = [value for key, held in groups.items() if key != name for value in held]
        gap, low, high = welch(rest, groups[name], LEVEL / len(names))
        rows.append(
            {"group": name, "n": len(groups[name]), "gap": tidy(gap), "low": tidy(low),
             "high": tidy(high), "mean": tidy(sum(groups[name]) / len(groups[name]))}
        )  # fmt: skip
    shown = [row for row in rows if row["low"] > bound]
    widest = max(shown or rows, key=lambda row: (row["low"], row["gap"], row["group"]))
    text = (
        f"{metric} by {by}: {widest['group']} ({widest['n']} questions) is "
        f"{widest['gap']:+.3f} below the rest, at least {widest['low']:+.3f} (one-sided, "
        f"corrected for {len(names)} groups); a gap of {bound:g} is allowed"
    )
    return Check(
        family="fairness", name=by, outcome="FAIL" if shown else "PASS", detail=text,
        change=f"a gap of {widest['group']} that is "
        f"{max(0.0, bound - float(widest['low'])):.3f} wider would be shown to be over {bound:g}"
        if not shown
        else f"better answers in {', '.join(str(row['group']) for row in shown)}",
        value=widest["gap"], bound=bound, low=widest["low"], high=widest["high"],
        n=sum(map(len, groups.values())),
        evidence={"method": "Welch, one-sided, Bonferroni over groups", "groups": rows},
    )  # fmt: skip


def welch(
    rest: Sequence[float], group: Sequence[float], level: float
) -> tuple[float, float, float]:
    """Mean of ``rest`` minus mean of ``group``, with one-sided bounds (unequal variances)."""
    import numpy as np
    from scipy.stats import t

    a, b = np.asarray(rest, float), np.asarray(group, float)
    parts = [x.var(ddof=1) / len(x) if len(x) > 1 else 0.0 for x in (a, b)]
    gap, se = float(a.mean() - b.mean()), float(sum(parts)) ** 0.5
    if se == 0:
        return gap, gap, gap
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True) if len(x) > 1
    )
    width = float(t.isf(level, freedom)) * se
    return gap, gap - width, gap + width


# -- latency and resources -----------------------------------------------------------------------


def latency(profile: Mapping[str, Any], live: Other | None, policy: Policy) -> Found:
    """The profile's figures at mixed lengths: ceilings, the peer, and the live release."""
    found = Found()
    block, mixed = policy.latency, profile["vllm"]["mixed"]
    samples = mixed.get("samples_ms", {})
    remedy = "a quiet machine (dvc repro --force profile), another engine setting, a smaller model"

    def add(name: str, value: float, bound: float, below: bool, **more: Any) -> None:
        ok = value <= bound if below else value >= bound
        found.checks.append(_measured("latency", name, value, bound, ok, below, remedy, **more))

    for kind, ceiling in (("ttft", block.ttft_p95_ms), ("tpot", block.tpot_p95_ms)):
        times = samples.get(kind, [])
        low, high = order_interval(times, 0.95)
        add(f"{kind}_p95_ms", mixed[f"{kind}_ms"]["p95"], ceiling, True,
            low=low, high=high, n=len(times) or None)  # fmt: skip
    add("tokens_per_s", mixed["tokens_per_s"], block.min_tokens_per_s, False)
    add("ratio_to_peer", profile["ratio"]["mixed"], block.min_ratio_to_peer, False)
    before = live.measured if live is not None else None
    if before is None:
        found.notes.append("latency: no figures of a live release to compare with")
    elif before["machine"] != machine(profile):
        found.notes.append("latency: the live release was measured on another kind of machine")
    else:
        now = figures(profile)
        for name, old in before["figures"].items():
            if old and now.get(name):
                slower = old / now[name] if name == "tokens_per_s" else now[name] / old
                add(f"{name}_to_live", tidy(slower), block.max_slowdown, True, against="live")
    return found


def machine(profile: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two timings to be compared."""
    return {key: profile["machine"].get(key) for key in ("kind", "cpus")}


def figures(profile: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the next release is compared with."""
    mixed = profile["vllm"]["mixed"]
    return {
        "ttft_p50_ms": mixed["ttft_ms"]["p50"],
        "tpot_p50_ms": mixed["tpot_ms"]["p50"],
        "tokens_per_s": mixed["tokens_per_s"],
    }


def resources(plan: Mapping[str, Any], profile: Mapping[str, Any], policy: Policy) -> Found:
    """The memory plan against its budget, and the measured peak against both."""
    total, budget = plan["total_bytes"], plan["budget_bytes"]
    peak, block = profile["vllm"]["peak_bytes"], policy.resources
    fits = total <= budget
    shown = f"the plan needs {total / 2**30:.2f} of {budget / 2**30:.2f} GiB"
    remedy = "a smaller bundle.kv_cache_memory_bytes or max_num_seqs, or a larger budget"
    found = Found()
    found.checks.append(
        Check(family="resources", name="plan", outcome="PASS" if fits else "FAIL", detail=shown,
              change=remedy, value=float(total), bound=float(budget), n=1,
              evidence={"method": "memory plan: exact weights and cache, estimated processes"})
    )  # fmt: skip
    for name, bound, base in (
        ("peak_of_budget", block.max_peak_of_budget, budget),
        ("peak_of_plan", block.max_peak_of_plan, total),
    ):
        value = peak / base
        found.checks.append(
            _measured("resources", name, value, bound, value <= bound, True, remedy, n=1)
        )
    return found


def _measured(
    family: str, name: str, value: float, bound: float, ok: bool, below: bool, remedy: str,
    **more: Any,
) -> Check:  # fmt: skip
    outcome: Word = "PASS" if ok else "FAIL"
    word = "at most" if below else "at least"
    return Check(
        family=family, name=name, outcome=outcome, value=tidy(value), bound=bound, change=remedy,
        detail=f"{name}: {value:.4g}, {word} {bound:g} is allowed",
        evidence={"measured": True, "method": "one run of the profile"}, **more,
    )  # fmt: skip


def without_figures(check: Check) -> Check:
    """A measured check as the verdict holds it: the outcome and the bound."""
    if not check.evidence.get("measured"):
        return check
    said = "holds" if check.outcome == "PASS" else "is broken"
    return check.model_copy(
        update={
            "value": None, "low": None, "high": None, "n": None, "evidence": {"measured": True},
            "detail": f"{check.name}: the bound {check.bound:g} {said} "
            "(figures of this machine: measured.json)",
        }
    )  # fmt: skip


def order_interval(
    values: Sequence[float], share: float, level: float = LEVEL
) -> tuple[float | None, float | None]:
    """Distribution-free one-sided bounds of a quantile by order statistics; None where so few
    values show no bound (a 95th percentile has an upper one from 59)."""
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    if not n:
        return None, None
    under = int(binom.ppf(level, n, share))  # P(fewer than that many below the quantile) <= level
    over = int(binom.isf(level, n, share)) + 1
    return (
        tidy(ordered[under - 1]) if under >= 1 else None,
        tidy(ordered[over - 1]) if over <= n else None,
    )
