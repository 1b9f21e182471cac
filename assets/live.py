"""Assets that change the world outside DVC: a published index, a registered model, a deployment."""

import json
import os
from pathlib import Path
from typing import Any

import dagster as dg

from assets.reports import report_link, with_report
from contracts.records import Release
from contracts.settings import Settings
from resources.dagster_process import run_process


class PublishConfig(dg.Config):
    """Of a run that publishes, for the launchpad."""

    accept_change: bool = False  # publish although more changed than params.yaml allows


@dg.asset(
    deps=["index", "retrieval", "acceptance"],
    group_name="knowledge",
    kinds={"qdrant"},
    description=with_report(
        "The newest index that passed its checks, behind one pointer that swaps at once.",
        "published_index",
    ),
)
def published_index(config: PublishConfig) -> dg.MaterializeResult[Any]:
    from assets.publishing import publish_knowledge

    pointer = publish_knowledge(Settings.from_env(), config.accept_change)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(str(pointer["md5"])),
        metadata={
            "dvc/md5": pointer["md5"],
            "path": pointer["path"],
            "version": pointer["version"],
            "previous": pointer["previous"] or "none",
            "documents": pointer["documents"],
            "hidden documents": len(pointer["tombstones"]),
            "recall": pointer["recall"],
            "change": report_link("published_index"),
        },
    )


@dg.asset(
    deps=["release"],
    group_name="model",
    kinds={"mlflow"},
    description="The release as a version of MLflow's registered model, alias `candidate`, and its "
    "prompts in MLflow's prompt registry.",
)
def registered_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    from resources.prompt_registry import mirror
    from resources.registry import MODEL, register

    settings = Settings.from_env()
    release = read_release(settings)
    version = register(release, settings, alias="candidate")
    mirrored = mirror(release, settings)
    if mirrored.problem:
        context.log.warning("prompts were not mirrored to MLflow: %s", mirrored.problem)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(release.id),
        metadata={
            "model": MODEL,
            "version": version,
            "alias": "candidate",
            "release": release.id,
            "prompts": str(mirrored),
        },
    )


@dg.asset(
    deps=["release", "registered_model"],
    group_name="release",
    kinds={"vllm"},
    description="The release behind the channel `stable`: engine started, asked, pointer flipped. "
    "The old one serves until the new one has answered.",
)
def deployment(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    from resources.registry import register

    settings = Settings.from_env()
    release = read_release(settings)
    lines = run_process(
        context,
        ["serving.deploy", "up", "--release", "data/release.json", "--channel", "stable"],
        cwd=settings.root,
    )
    result = json.loads(lines[-1])
    write_baseline(settings.root, release.id)
    register(release, settings, alias="stable")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(release.id),
        metadata={key: value for key, value in result.items() if value is not None},
    )


def read_release(settings: Settings) -> Release:
    """data/release.json. Raises dagster.Failure when no release was built."""
    path = settings.root / "data" / "release.json"
    try:
        return Release.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise dg.Failure("data/release.json does not exist. Next: materialize `release`.") from None


def write_baseline(root: Path, release_id: str) -> None:
    """Keep the deployed release's per-question scores: the next gate compares with them.

    Written only when the scorecard is another one, so that deploying the same answers again leaves
    the gate as it was.
    """
    from contracts.digests import path_md5
    from stages.gate import baseline_from_scorecard

    scorecard = root / "data" / "scorecard"
    path = root / "data" / "stable.json"
    md5 = path_md5(scorecard)
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("scorecard") == md5:
        return
    part = path.with_name("stable.json.part")
    value = baseline_from_scorecard(scorecard / "scores.parquet", release_id, md5, before)
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)


LIVE = [published_index, registered_model, deployment]
