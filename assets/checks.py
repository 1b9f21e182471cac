"""Asset checks: what the stages measured, as pass or fail in the UI. All of them block.

The stages themselves fail on a bad result, so that `dvc repro` is as strict as Dagster; the checks
put the evidence where people look, and hold everything downstream should a stage's policy loosen.
"""

import json
from collections.abc import Iterable
from typing import Any

import dagster as dg

from assets.reports import report_link
from contracts.settings import Settings


def read_report(path: str) -> dict[str, Any]:
    """A report that a stage wrote. Raises dagster.Failure when there is none."""
    full = Settings.from_env().root / path
    try:
        report: dict[str, Any] = json.loads(full.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise dg.Failure(
            f"{path} does not exist. Next: materialize the asset it belongs to."
        ) from None
    return report


def listed(lines: Iterable[str]) -> dg.MarkdownMetadataValue:
    """Lines below each other: the UI hides a list behind "[Show JSON]"."""
    return dg.MetadataValue.md("\n".join(f"- {line}" for line in lines) or "none")


def suite_result(asset: str) -> dg.AssetCheckResult:
    """The Great Expectations suite that the stage ``asset`` ran, as its check."""
    report = read_report(f"data/{asset}/report.json")
    failed = [row for row in report["expectations"] if not row["success"]]
    return dg.AssetCheckResult(
        passed=not failed,
        metadata={
            "report": report_link(asset),
            "expectations": len(report["expectations"]),
            "failed": listed(f"{row['expectation']}: {row['observed']}" for row in failed),
        },
    )


@dg.asset_check(
    asset="documents", description="Files of every source that was read so far could be read."
)
def documents_readable() -> dg.AssetCheckResult:
    """Does not block: the stage `quality` does, when too many documents are defective."""
    folder = Settings.from_env().root / "data" / "metrics"
    counts = {
        path.stem.removeprefix("documents-"): int(json.loads(path.read_text())["unreadable"])
        for path in sorted(folder.glob("documents-*.json"))
    }
    return dg.AssetCheckResult(
        passed=not any(counts.values()),
        severity=dg.AssetCheckSeverity.WARN,
        metadata={f"unreadable in {source}": count for source, count in counts.items()},
    )


@dg.asset_check(asset="quality", blocking=True, description="Every expectation of the suite holds.")
def quality_suite() -> dg.AssetCheckResult:
    return suite_result("quality")


@dg.asset_check(
    asset="acceptance", blocking=True, description="Every expectation of the chunks' suite holds."
)
def acceptance_suite() -> dg.AssetCheckResult:
    return suite_result("acceptance")


@dg.asset_check(asset="retrieval", blocking=True, description="Recall on the golden dev questions.")
def retrieval_floor() -> dg.AssetCheckResult:
    from contracts.params import load_params

    report = read_report("data/metrics/retrieval.json")
    params = load_params(Settings.from_env().root / "params.yaml").retrieval
    metric = f"recall_at_{params.top_k[-1]}"
    value = report.get(metric)
    return dg.AssetCheckResult(
        passed=value is not None and value >= params.min_recall,
        metadata={
            "report": report_link("retrieval"),
            "metric": metric,
            "value": value if value is not None else "missing",
            "floor": params.min_recall,
            "search": "as dev chooses"
            if report.get("agrees_with_choice")
            else "Warning: dev chooses another search than index.search; see the report",
        },
    )


@dg.asset_check(asset="gate", blocking=True, description="The gate's verdict is PASS.")
def gate_verdict() -> dg.AssetCheckResult:
    """UNDECIDED is no pass either."""
    report = read_report("data/gate/verdict.json")
    return dg.AssetCheckResult(
        passed=report["verdict"] == "PASS",
        metadata={
            "report": report_link("gate"),
            "verdict": report["verdict"],
            **{f"family {name}": word for name, word in report["families"].items()},
            "looks": len(report["looks"]),
            "policy": report["policy_sha256"],
            "reasons": listed(report["reasons"]),
        },
    )


CHECKS = [documents_readable, quality_suite, acceptance_suite, retrieval_floor, gate_verdict]
