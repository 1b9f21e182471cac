"""Freshness: the age of a source is that of its newest commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from contracts.errors import ConfigError
from contracts.params import Params, load_params
from stages.freshness import stale_sources

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def with_bounds(**days: int) -> Params:
    changed = PARAMS.acceptance.model_copy(update={"max_age_days": days})
    return PARAMS.model_copy(update={"acceptance": changed})


def test_the_age_of_a_source_is_that_of_its_newest_commit(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text")
    when = "2026-01-01T00:00:00Z"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t.test", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "docs"], ["commit", "-q", "-m", "first"]):
        subprocess.run(
            [*git, *command],
            cwd=tmp_path,
            check=True,
            env={"GIT_COMMITTER_DATE": when, "GIT_AUTHOR_DATE": when, "PATH": "/usr/bin:/bin"},
        )
    committed = 1767225600.0
    assert stale_sources(tmp_path, with_bounds(docs=30), committed + 29 * 86400) == []
    (stale,) = stale_sources(tmp_path, with_bounds(docs=30), committed + 31 * 86400)
    assert stale == "docs: its newest commit is 31.0 days old, more than 30"
    assert stale_sources(tmp_path, with_bounds(), committed) == []
    with pytest.raises(ConfigError) as caught:
        stale_sources(tmp_path, with_bounds(dagster=1, nosuch=1), committed)
    assert caught.value.offenders == [
        "dagster: git knows no commit of it",
        "nosuch: no such source",
    ]
