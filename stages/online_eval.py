"""What a day's traffic says about quality, without golden answers.

In: the day's request log (rows of ``contracts.records.RequestRecord``) and, from the installed
releases that answered, the texts of the chunks that the rows name. Out: one JSON file of counts,
rates and percentiles, overall and per release.

The same scoring as the gate's (``resources.scorers.deterministic``) where no reference is needed:
does every claim stand in the passage that it cites? A row whose chunks cannot be found is counted
as invalid and enters no mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import RatchetError
from contracts.params import Params
from resources.scorers import deterministic as scoring
from stages import harness, statistics, tables


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out`` from ``paths.requests``."""
    columns = ["response_id", "time", "release", "answer", "refused", "status", "error"]
    columns += ["chunk_ids", "latency_ms", "ttft_ms", "prompt_tokens", "completion_tokens"]
    rows = tables.read_table(paths.requests, columns).to_pylist()
    chunks = chunks_of({str(row["release"]) for row in rows if row["release"]})
    result = evaluate(rows, chunks, min_requests=params.monitoring.min_requests)
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


def score_row(row: Mapping[str, Any], chunks: Chunks) -> dict[str, Any]:
    """Scores of one answered request: ``refused``, and ``citation_in_context`` and ``grounded``
    unless it was refused; ``invalid`` holds a reason where a passage cannot be found."""
    ids = _list(row.get("chunk_ids"))
    known = chunks.get(str(row.get("release")), {})
    missing = [chunk for chunk in ids if chunk not in known]
    refused = bool(row.get("refused")) or scoring.is_refusal(str(row.get("answer") or ""))
    if refused:
        return {"refused": True, "invalid": None}
    if missing:
        return {
            "refused": False,
            "invalid": f"{len(missing)} of {len(ids)} passages are not in the release's chunks",
        }
    passages = {number: known[chunk] for number, chunk in enumerate(ids, start=1)}
    answer = str(row.get("answer") or "")
    return {
        "refused": False,
        "invalid": None,
        "citation_in_context": scoring.citation_in_context(answer, passages),
        "grounded": scoring.grounded(answer, passages),
    }


def _measure(rows: Sequence[Mapping[str, Any]], chunks: Chunks) -> dict[str, Any]:
    answered = [
        row for row in rows if not row.get("error") and 200 <= int(row.get("status") or 0) < 300
    ]
    scores = [score_row(row, chunks) for row in answered]
    latency = [float(row["latency_ms"]) for row in answered if _number(row.get("latency_ms"))]
    ttft = [float(row["ttft_ms"]) for row in answered if _number(row.get("ttft_ms"))]
    return {
        "requests": len(rows),
        "errors": len(rows) - len(answered),
        "error_rate": _share(len(rows) - len(answered), len(rows)),
        "answered": len(answered),
        "refusal_rate": _share(sum(score["refused"] for score in scores), len(scores)),
        "citation_in_context": _mean(score.get("citation_in_context") for score in scores),
        "grounded": _mean(score.get("grounded") for score in scores),
        "invalid": sum(score["invalid"] is not None for score in scores),
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


def _list(value: Any) -> list[str]:
    """A column's list: Parquet gives numpy arrays or None."""
    return [] if value is None else [str(item) for item in value]


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
    harness.main("online_eval", run, paths=("requests", "out"))
