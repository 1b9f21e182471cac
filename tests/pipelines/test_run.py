from __future__ import annotations

import pytest

from contracts.errors import ConfigError
from contracts.settings import Settings
from pipelines.run import run_job


@pytest.mark.parametrize(
    ("job", "partition", "told"),
    [
        ("lifecicle", None, "one of: sources, knowledge, lifecycle, deploy, try_release, nightly"),
        ("sources", None, "needs a partition"),
        ("sources", "dogs", "one of: docs, dagster"),
        ("nightly", "2025-12-31", "2026-01-01, …"),
        ("deploy", "docs", "has no partitions"),
    ],
)
def test_wrong_words_get_the_right_ones(
    settings: Settings, job: str, partition: str | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run_job(job, partition, settings)
