"""Stage ``release``: one file that names, by digest, everything that answers a question.

In: the path of every member. Out: ``data/release.json`` (``contracts.records.Release``), whose id
is the hash of all the rest. It is made only where the gate said PASS.

The profile is no member, and of the gate's folder only the verdict is: timings differ between
machines, and two machines that build the same things must get the same release. Both are found
beside the release in dvc.lock. The git commit is a
part, because a trace ends in sources; so a release is built again, under another id, only when one
of its inputs changes and not at every commit.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from contracts.digests import path_md5, path_size
from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Member, Release
from contracts.settings import Settings
from stages import harness
from stages.evidence import require_pass

#: Members, named as the stages that make them; ``golden`` is the evaluation set.
MEMBERS = (
    "documents", "quality", "chunks", "vectors", "index", "retrieval", "base_model", "examples",
    "adapter", "answers", "scorecard", "gate", "policy", "prompts", "bundle", "golden", "safety",
)  # fmt: skip
#: Parameter blocks that shape what is released. ``profile`` and ``monitoring`` do not.
BLOCKS = (
    "documents", "quality", "chunks", "vectors", "index", "retrieval", "base_model", "examples",
    "adapter", "answers", "scorecard", "bundle",
)  # fmt: skip


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out``."""
    from resources import prompts

    members = {name: Path(getattr(paths, name)) for name in MEMBERS}
    require_all(members)
    verdict = require_pass(members["gate"])  # data/gate/verdict.json
    prompt = prompts.read(members["prompts"]).get(params.answers.prompt)
    body: dict[str, Any] = {
        "members": {name: member(path).model_dump() for name, path in members.items()},
        "prompt": {"name": prompt.name, "version": prompt.version, "sha256": prompt.sha256},
        "model": model(members),
        "gate": gate(verdict),
        "params": {name: getattr(params, name).model_dump(mode="json") for name in BLOCKS},
        "git_commit": git_commit(Settings.from_env().root),
    }
    body["eval_set"] = body["members"]["golden"]["md5"]
    release = Release.model_validate(body | {"id": Release.compute_id(body)})
    harness.write_json(paths.out, release.model_dump(mode="json"))
    harness.progress(
        f"release: {release.id}, model {release.model['name']}, {len(members)} members"
    )
    return {
        "members": float(len(members)),
        "bytes": float(sum(item.size for item in release.members.values())),
    }


def require_all(members: dict[str, Path]) -> None:
    """Raise InputError listing every member that is missing, empty or outside the checkout."""
    offenders = []
    for name, path in members.items():
        if path.is_absolute() or ".." in path.parts:
            offenders.append(f"{name}: {path} is not a path inside the checkout")
        elif not path.exists():
            offenders.append(f"{name}: {path} does not exist")
        elif path_size(path) == 0:
            offenders.append(f"{name}: {path} is empty")
    if offenders:
        raise InputError(
            "A release needs all its members.", offenders=offenders, next="dvc repro, or dvc pull"
        )


def member(path: Path) -> Member:
    """Path, digest as dvc.lock has it, and bytes."""
    return Member(path=path.as_posix(), md5=path_md5(path), size=path_size(path))


def model(members: dict[str, Path]) -> dict[str, Any]:
    """What the engine serves, and what it was made of."""
    bundle = members["bundle"]
    launch = json.loads((bundle / "launch.json").read_text(encoding="utf-8"))
    config = json.loads((bundle / launch["model"] / "config.json").read_text(encoding="utf-8"))
    return {
        "name": launch["served_model_name"],
        "engine": launch["engine"],
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "base_md5": path_md5(members["base_model"]),
        "adapter_md5": path_md5(members["adapter"]),
        "checkpoint_md5": path_md5(bundle / launch["model"]),
    }


def gate(verdict: dict[str, Any]) -> dict[str, Any]:
    """Verdict, digest of the policy that judged, and the headline numbers."""
    return {
        "verdict": verdict["verdict"],
        "policy_sha256": verdict["policy_sha256"],
        "baseline": verdict["baseline"],
        "anchor": verdict["anchor"],
        "families": verdict["families"],
        "scores": {
            check["name"]: check["value"] for check in verdict["checks"] if check["kind"] == "floor"
        },
        "checks": len(verdict["checks"]),
        "looks": len(verdict["looks"]),
    }


def git_commit(root: Path) -> str:
    """HEAD of the checkout at ``root``. Raises InputError where there is none."""
    result = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD^{commit}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise InputError(
            "A release names a git commit, and here is none.",
            where=str(root),
            next="run inside a git checkout with at least one commit",
        )
    return result.stdout.strip()


if __name__ == "__main__":
    harness.main("release", run, paths=(*MEMBERS, "out"))
