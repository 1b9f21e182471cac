"""The asset of a rollout: a run begins one, another run notes how it ended; none waits for it."""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.live import run_or_wait
from contracts.settings import Settings


class RolloutConfig(dg.Config):
    """Of a run, for the launchpad and the sensor."""

    release: str = "data/release.json"  # a file, or the id of an installed release
    begin: bool = True  # False: note how the last one ended
    strategy: str = ""  # canary, ab, shadow, blue_green; else the policy's
    reason: str = ""


@dg.asset(
    deps=["release", "registered_model"],
    group_name="release",
    kinds={"vllm"},
    description="data/release.json tried beside the release that the channel `stable` serves, by "
    "data/policies/rollout.yaml. Begun by a run; the sensor `rollout_tick` (or `ratchet up`) "
    "takes it forward or back, and a second run notes the end. A release that has to wait for a "
    "person ends the run without a materialization; the sensor `approved` runs it again.",
    output_required=False,
)
def rollout(
    context: dg.AssetExecutionContext, config: RolloutConfig
) -> Iterator[dg.MaterializeResult[Any]]:
    settings = Settings.from_env()
    if not config.begin:
        yield _noted(context, settings)
        return
    more = ["--strategy", config.strategy] if config.strategy else []
    lines = run_or_wait(
        context,
        ["serving.rollout", "start", "--release", config.release, *more, "--reason", config.reason],
        settings,
    )
    if lines is not None:
        begun = json.loads(lines[-1])
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(begun["release"]),
            metadata={key: value for key, value in begun.items() if value is not None},
        )


def _noted(context: dg.AssetExecutionContext, settings: Settings) -> dg.MaterializeResult[Any]:
    """The end of the last rollout. What follows a promotion in the ledger is brought to it."""
    from assets.following import follow
    from resources.ledger import Ledger

    ended = last_end(settings)
    if ended is None:
        raise dg.Failure("No rollout has ended on the channel `stable`.", allow_retries=False)
    metadata = {key: ended[key] for key in ("did", "why", "release", "ledger")}
    if ended["did"] != "promote":
        raise dg.Failure(
            f"The candidate was taken back: {ended['why']}", metadata=metadata, allow_retries=False
        )
    for line in follow(settings, Ledger.open(settings)):
        context.log.info(line)
    return dg.MaterializeResult(data_version=dg.DataVersion(ended["release"]), metadata=metadata)


def last_end(settings: Settings) -> dict[str, Any] | None:
    """How the channel's last rollout ended, from the ledger; None before the first end."""
    from resources.ledger import Ledger

    rows = Ledger.open(settings).entries(channel="stable", kinds=("promoted", "rolled_back"))
    for row in reversed(rows):
        said = row.body.get("rollout")
        if isinstance(said, dict):
            return {
                "did": said.get("action"), "why": row.reason, "release": row.release,
                "ledger": row.seq, "time": row.time,
            }  # fmt: skip
    return None


ROLLOUT = [rollout]
