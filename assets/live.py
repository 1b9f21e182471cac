"""Assets that change the world outside DVC: a published index, a registered model, a deployment."""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.reports import report_link, with_report
from contracts.errors import ApprovalError
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
    description="The release as a version of MLflow's registered model, its verdict in the ledger, "
    "which MLflow's aliases follow, and its prompts in MLflow's prompt registry.",
)
def registered_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    from resources import promotion, registry
    from resources.ledger import Ledger
    from resources.prompt_registry import mirror

    settings = Settings.from_env()
    release = read_release(settings)
    ledger = Ledger.open(settings)
    version = registry.register(release, settings)
    promotion.record_verdict(ledger, release, f"dagster:{context.run_id}", newest=True)
    for line in registry.follow(settings, ledger):
        context.log.info(line)
    mirrored = mirror(release, settings)
    if mirrored.problem:
        context.log.warning("prompts were not mirrored to MLflow: %s", mirrored.problem)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(release.id),
        metadata={
            "model": registry.MODEL,
            "version": version,
            "alias": "candidate",
            "release": release.id,
            "prompts": str(mirrored),
        },
    )


class DeployConfig(dg.Config):
    """Of a run that deploys, for the launchpad and the sensor `approved`."""

    release: str = "data/release.json"  # a file, or the id of an installed release


@dg.asset(
    deps=["release", "registered_model"],
    group_name="release",
    kinds={"vllm"},
    description="The release behind the channel `stable`: engine started, asked, ledger written, "
    "pointer flipped. The old one serves until the new one has answered. A release that waits for "
    "a person ends the run without a materialization; the sensor `approved` runs it again.",
    output_required=False,
)
def deployment(
    context: dg.AssetExecutionContext, config: DeployConfig
) -> Iterator[dg.MaterializeResult[Any]]:
    from assets.following import follow
    from resources.ledger import Ledger

    settings = Settings.from_env()
    lines = run_or_wait(
        context,
        ["serving.deploy", "up", "--release", config.release, "--channel", "stable"],
        settings,
    )
    if lines is None:
        return
    result = json.loads(lines[-1])
    for line in follow(settings, Ledger.open(settings)):
        context.log.info(line)
    yield dg.MaterializeResult(
        data_version=dg.DataVersion(result["release"]),
        metadata={key: value for key, value in result.items() if value is not None},
    )


def run_or_wait(
    context: dg.AssetExecutionContext, arguments: list[str], settings: Settings
) -> list[str] | None:
    """The process's lines; None when its release waits for a person, which is no failure and holds
    no worker: the request is in the ledger. Raises dagster.Failure."""
    try:
        return run_process(context, arguments, cwd=settings.root)
    except dg.Failure as failure:
        if failure.metadata["exit_code"].value != ApprovalError.exit_code:
            raise
    context.log.warning("it waits for a person: `ratchet approvals list`")
    return None


def read_release(settings: Settings) -> Release:
    """data/release.json. Raises dagster.Failure when no release was built."""
    path = settings.root / "data" / "release.json"
    try:
        return Release.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise dg.Failure("data/release.json does not exist. Next: materialize `release`.") from None


LIVE = [published_index, registered_model, deployment]
