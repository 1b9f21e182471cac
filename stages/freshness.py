"""freshness: which sources have not been touched for too long.

In: ``acceptance.max_age_days`` of params.yaml, the git history, the time now. Out: the sources that
are too old, in words. No part of a DVC stage: a tracked output must not depend on the clock, so
this is asked when an index is published.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from contracts.errors import ConfigError
from contracts.params import Params


def stale_sources(root: Path, params: Params, now: float) -> list[str]:
    """Sources whose newest commit is older than ``acceptance.max_age_days`` allows, in words.

    Args:
        root: the git checkout.
        now: seconds since 1970; the caller's clock.

    A source's ``path`` is what counts: a folder of the repository, or the lock file that pins the
    package. Raises ConfigError for a bound on a source that does not exist or git does not know.
    """
    wrong: list[str] = []
    stale: list[str] = []
    for source, bound in sorted(params.acceptance.max_age_days.items()):
        known = params.documents.sources.get(source)
        newest = _newest_commit(root, known.path) if known else None
        if newest is None:
            wrong.append(
                f"{source}: " + ("git knows no commit of it" if known else "no such source")
            )
        elif now - newest > bound * 86400:
            days = (now - newest) / 86400
            stale.append(f"{source}: its newest commit is {days:.1f} days old, more than {bound}")
    if wrong:
        raise ConfigError(
            "The age of a source cannot be judged.",
            offenders=wrong,
            where="params.yaml: acceptance.max_age_days",
            next="name sources of documents.sources whose path git tracks",
        )
    return stale


def _newest_commit(root: Path, path: str) -> int | None:
    """When the last commit that touched the path was made, in seconds since 1970."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct", "--", path],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    text = done.stdout.strip()
    return int(text) if done.returncode == 0 and text else None
