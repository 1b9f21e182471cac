"""Dated assets: what people asked on a day, how well it was answered, whether it has drifted.

One daily partition (UTC) each, so that any day can be backfilled from the UI. Results lie under
``<state>/monitoring/<day>/``. The work runs as processes, as stages do: embeddings need torch,
which the process that loads the definitions must not import.
"""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from contracts.digests import file_md5
from contracts.settings import Settings
from resources.dagster_process import run_process

#: Today is a partition too, so that a demo or an operator can look at the running day.
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_offset=1)


def day_dir(settings: Settings, day: str) -> Path:
    path = settings.monitoring_dir / day
    path.mkdir(parents=True, exist_ok=True)
    return path


def result_of(path: Path) -> dg.MaterializeResult[Any]:
    """A JSON result as metadata; its digest is the data version."""
    value = json.loads(path.read_text(encoding="utf-8"))
    flat = {key: item for key, item in value.items() if isinstance(item, (str, int, float, bool))}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(file_md5(path)),
        metadata={**flat, "result": dg.MetadataValue.path(str(path))},
    )


@dg.asset(
    deps=["deployment"],
    partitions_def=DAYS,
    group_name="monitoring",
    kinds={"parquet"},
    description="One day of the gateway's request log as one table.",
)
def requests(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    settings = Settings.from_env()
    out = day_dir(settings, context.partition_key)
    run_process(
        context,
        [
            "resources.requests",
            "--day",
            context.partition_key,
            "--out",
            str(out / "requests.parquet"),
        ],
        cwd=settings.root,
    )
    return result_of(out / "requests.json")


@dg.asset(
    deps=["requests"],
    partitions_def=DAYS,
    group_name="monitoring",
    kinds={"python"},
    description="The day's answers scored without a golden truth: grounded, refused, failed.",
)
def online_eval(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    settings = Settings.from_env()
    out = day_dir(settings, context.partition_key)
    run_process(
        context,
        [
            "stages.online_eval",
            *("--requests", str(out / "requests.parquet")),
            *("--judges", "data/judges.json"),
            *("--out", str(out / "online_eval.json")),
        ],
        cwd=settings.root,
    )
    return result_of(out / "online_eval.json")


@dg.asset(
    deps=["requests", "online_eval"],
    partitions_def=DAYS,
    group_name="monitoring",
    kinds={"evidently"},
    description="Whether the day's questions differ from the reference, and whether that did harm.",
)
def drift(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    settings = Settings.from_env()
    out = day_dir(settings, context.partition_key)
    run_process(
        context,
        [
            "stages.drift",
            *("--requests", str(out / "requests.parquet")),
            *("--online-eval", str(out / "online_eval.json")),
            *("--golden", "data/golden/questions.yaml"),
            *("--out", str(out / "drift.json")),
        ],
        cwd=settings.root,
    )
    return result_of(out / "drift.json")


MONITORING = [requests, online_eval, drift]
