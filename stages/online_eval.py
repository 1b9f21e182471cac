"""What a day's traffic says about quality, without golden answers.

In: the day's request log (rows of ``contracts.records.RequestRecord``) and, from the installed
releases that answered, the texts of the chunks that the rows name. Out: one JSON file of counts,
rates and percentiles, overall and per release.

The same scoring as the gate's where no reference is needed (``resources.scorers.live``): does every
claim stand in the passage that it cites? A row whose chunks cannot be found is counted as invalid
and enters no mean. Where params.yaml names a judge and people have been shown to agree with it, it
scores a sample of the day too: always the same one of the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.digests import text_sha
from contracts.errors import RatchetError
from contracts.params import Judge, Params
from resources.scorers import live
from resources.scorers.deterministic import is_refusal
from resources.scorers.deterministic_scorer import OF_PASSAGES
from resources.scorers.scorer import Item, Score
from stages import harness, statistics, tables


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out`` from ``paths.requests``."""
    columns = ["response_id", "time", "release", "question", "answer", "refused", "status", "error"]
    columns += ["chunk_ids", "latency_ms", "ttft_ms", "prompt_tokens", "completion_tokens"]
    rows = tables.read_table(paths.requests, columns).to_pylist()
    chunks = chunks_of({str(row["release"]) for row in rows if row["release"]})
    result = evaluate(rows, chunks, min_requests=params.monitoring.min_requests)
    if params.scorecard.judge is not None:
        items = sample(rows, chunks, params.monitoring.judged)
        judged = judge_sample(items, params.scorecard.judge, paths.judges)
        result["judge"] = judged
        result |= {name: found["worst_case"] for name, found in judged["metrics"].items()}
    harness.write_json(paths.out, result)
    harness.progress(
        f"online_eval: {result['requests']} requests, {result['errors']} failed, "
        f"refused {result['refusal_rate']}, cited in context {result['citation_in_context']}"
    )
    return {key: float(value) for key, value in result.items() if isinstance(value, int | float)}


#: Release → chunk id → text. Per release, because an id names a span and its text may change.
Chunks = Mapping[str, Mapping[str, str]]


def chunks_of(releases: Iterable[str]) -> dict[str, dict[str, str]]:
    """Chunks of those releases. One that is gone is said, and its answers are invalid."""
    from contracts.settings import Settings
    from resources.releases import load

    found: dict[str, dict[str, str]] = {}
    for name in sorted(releases):
        try:
            path: Path = load(Settings.from_env(), name).chunks
            table = tables.read_table(path, ["chunk_id", "text"])
        except RatchetError as problem:
            harness.progress(
                f"online_eval: answers of release {name} cannot be judged: {problem.what}"
            )
            continue
        ids, texts = table["chunk_id"].to_pylist(), table["text"].to_pylist()
        found[name] = dict(zip(ids, texts, strict=True))
    return found


def evaluate(
    rows: Sequence[Mapping[str, Any]], chunks: Chunks, *, min_requests: int = 1
) -> dict[str, Any]:
    """One night's numbers.

    Args:
        rows: request records, failed ones included.
        chunks: release → chunk id → text, of every release that answered.
        min_requests: under this many answered requests ``verdict`` is "too_few".

    Returns:
        ``requests, errors, error_rate, answered, refusal_rate, citation_in_context, grounded,
        invalid, latency_p50_ms …, ttft_p50_ms …, prompt_tokens, completion_tokens, releases,
        verdict``. A rate over nothing is None.
    """
    ordered = sorted(rows, key=lambda row: (str(row.get("time")), str(row.get("response_id"))))
    result = _measure(ordered, chunks)
    releases = sorted({str(row["release"]) for row in ordered if row.get("release")})
    result["releases"] = {
        release: _measure([row for row in ordered if row.get("release") == release], chunks)
        for release in releases
    }
    result["verdict"] = "ok" if result["answered"] >= min_requests else "too_few"
    return result


def sample(rows: Sequence[Mapping[str, Any]], chunks: Chunks, count: int) -> list[Item]:
    """Up to ``count`` answers that are no refusals, drawn by the digest of their response id: the
    same ones whatever the order of the rows."""
    found = [live.item_of(row, chunks.get(str(row.get("release")), {})) for row in rows]
    items = [item for item in found if item is not None and not is_refusal(item.answer)]
    return sorted(items, key=lambda item: (text_sha(item.id), item.id))[:count]


def judge_sample(items: Sequence[Item], judge: Judge, calibrations: Path) -> dict[str, Any]:
    """What the judge says of these answers.

    Returns:
        ``sampled``; ``skipped``: metric -> why it was not asked; ``metrics``: metric -> ``n,
        invalid, reasons, coverage, mean, worst_case``, as the scorecard has them.
    """
    from contracts.settings import Settings
    from resources.scorers.judge_scorer import JudgeScorer

    settings = Settings.from_env()
    try:
        doubts = JudgeScorer.of(judge, calibrations, settings).doubts()
    except RatchetError as problem:  # the night's other numbers do not depend on it
        return {"sampled": 0, "skipped": {"judge": problem.what}, "metrics": {}}
    trusted = [name for name in judge.criteria if doubts[f"judge_{name}"] is None]
    skipped = {name: doubt for name, doubt in doubts.items() if doubt is not None}
    if not trusted or not items:
        return {"sampled": 0, "skipped": skipped, "metrics": {}}
    asked = judge.model_copy(update={"criteria": trusted})
    scores = JudgeScorer.of(asked, calibrations, settings).score(items)
    by_metric: dict[str, list[Score]] = {}
    for score in (score for of_item in scores for score in of_item):
        by_metric.setdefault(score.metric, []).append(score)
    metrics = {name: _judged(found) for name, found in sorted(by_metric.items())}
    return {"sampled": len(items), "skipped": skipped, "metrics": metrics}


def _judged(scores: Sequence[Score]) -> dict[str, Any]:
    """Of one metric. A score without a value is counted, and as 0 in ``worst_case``; one that the
    calibration does not cover (another model answered) has none."""
    values = [s.value for s in scores if s.value is not None and s.uncalibrated is None]
    reasons = Counter((s.reason or f"uncalibrated: {s.uncalibrated}").split(":")[0] for s in scores
                      if s.value is None or s.uncalibrated is not None)  # fmt: skip
    return {
        "n": len(values),
        "invalid": len(scores) - len(values),
        "reasons": dict(sorted(reasons.items())),
        "coverage": _share(len(values), len(scores)),
        "mean": _mean(values),
        "worst_case": round(sum(values) / len(scores), 6),
    }


def _measure(rows: Sequence[Mapping[str, Any]], chunks: Chunks) -> dict[str, Any]:
    answered = [row for row in rows if live.answered(row)]
    scores = [
        {score.metric: score for score in live.score_row(row, chunks.get(str(row["release"]), {}))}
        for row in answered
    ]
    latency = [float(row["latency_ms"]) for row in answered if _number(row.get("latency_ms"))]
    ttft = [float(row["ttft_ms"]) for row in answered if _number(row.get("ttft_ms"))]
    return {
        "requests": len(rows),
        "errors": len(rows) - len(answered),
        "error_rate": _share(len(rows) - len(answered), len(rows)),
        "answered": len(answered),
        "refusal_rate": _mean(found["refusal"].value for found in scores if found),
        **{
            metric: _mean(found[metric].value for found in scores if metric in found)
            for metric in OF_PASSAGES
        },
        "invalid": sum(any(s.value is None for s in found.values()) for found in scores),
        **{
            f"{name}_p{int(share * 100)}_ms": statistics.percentile(values, share)
            for name, values in (("latency", latency), ("ttft", ttft))
            for share in (0.5, 0.95, 0.99)
        },
        **{
            name: sum(int(row[name]) for row in answered if _number(row.get(name)))
            for name in ("prompt_tokens", "completion_tokens")
        },
    }


def _number(value: Any) -> bool:
    """True for a number that is neither None nor NaN (pandas turns None into NaN)."""
    return isinstance(value, int | float) and value == value


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _mean(values: Iterable[Any]) -> float | None:
    """Mean of what is there; rows without the value do not take part and are counted elsewhere."""
    found = [float(value) for value in values if value is not None]
    return round(sum(found) / len(found), 6) if found else None


if __name__ == "__main__":
    harness.main("online_eval", run, paths=("requests", "judges", "out"))
