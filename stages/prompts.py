"""Stage ``prompts``: every prompt version, its hash and its tags as one self-contained file.

In: the folder of templates (``prompts/``). Out: ``data/prompts.json``, which a release names and
the gateway renders from, so that no one serves a template that is only in a working tree. Every
version is parsed and test-rendered; all offenders are reported at once.
"""

from __future__ import annotations

from typing import Any

from contracts.errors import ConfigError, RatchetError
from contracts.params import Params
from resources import prompts
from stages import harness


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out`` from the folder ``paths.prompts``."""
    loaded = prompts.load(paths.prompts)
    try:
        stable = loaded.get(params.answers.prompt)
    except RatchetError as error:
        raise ConfigError(
            f"answers.prompt names no prompt: {error.what}", where="params.yaml", next=error.next
        ) from None
    harness.write_json(paths.out, loaded.to_json())
    harness.progress(f"prompts: {len(loaded.all())} versions, answers use {stable}")
    return {"prompts": float(len(loaded.versions)), "versions": float(len(loaded.all()))}


if __name__ == "__main__":
    harness.main("prompts", run, paths=("prompts", "out"))
