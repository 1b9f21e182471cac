"""Jobs. One run is either partitioned or not, so sources and days have jobs of their own.

A job that selects partitioned and unpartitioned assets together is accepted by Dagster and fails
when it runs ("Cannot access partition_key for a non-partitioned run").
"""

from __future__ import annotations

import dagster as dg

from assets.monitoring import DAYS

STAGES = dg.AssetSelection.groups("knowledge", "model", "evaluation", "release")
# Not in the jobs: `index_sweep`, evidence that costs 8 s and that nothing waits for.
LIFECYCLE = STAGES - dg.AssetSelection.assets("documents", "deployment", "rollout", "index_sweep")

# Not `documents`: Dagster wants names of jobs and of steps to differ.
sources = dg.define_asset_job(
    "sources",
    selection=dg.AssetSelection.assets("documents"),
    description="Read one source of documents. One partition a source.",
)
knowledge = dg.define_asset_job(
    "knowledge",
    selection=dg.AssetSelection.groups("knowledge")
    - dg.AssetSelection.assets("documents", "index_sweep"),
    description="From the documents that were read to a published index.",
)
lifecycle = dg.define_asset_job(
    "lifecycle",
    selection=LIFECYCLE,
    description="From the documents that were read to a certified release; fresh work is skipped.",
)
deploy = dg.define_asset_job(
    "deploy",
    selection=dg.AssetSelection.assets("deployment"),
    description="Put data/release.json behind the channel `stable`.",
)
try_release = dg.define_asset_job(
    "try_release",
    selection=dg.AssetSelection.assets("rollout"),
    description="Try data/release.json beside the release that `stable` serves.",
)
nightly = dg.define_asset_job(
    "nightly",
    selection=dg.AssetSelection.groups("monitoring"),
    partitions_def=DAYS,
    description="One day's requests, their evaluation, and the drift verdict.",
)

JOBS = [sources, knowledge, lifecycle, deploy, try_release, nightly]
