"""From an answer back to the bytes it came from.

answer -> release -> who let it in -> prompt, model, adapter, base -> examples -> chunks ->
documents -> file, MD5 and git commit, and the MLflow and Dagster runs that made them. Everything is
read from the request log, the ledger, the installed release, DVC's cache and MLflow; nothing is
guessed: what cannot be found says so.
"""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from contracts.digests import file_md5, text_sha
from contracts.errors import NotFoundError, RatchetError
from contracts.records import Release, RequestRecord
from contracts.settings import Settings

#: Members of a release in the order in which a reader walks back.
ORDER = (
    "prompts", "bundle", "adapter", "base_model", "examples", "scorecard", "gate", "profile",
    "index", "vectors", "chunks", "quality", "documents", "golden",
)  # fmt: skip


def trace(response_id: str, settings: Settings) -> dict[str, Any]:
    """Everything behind one response.

    Raises:
        NotFoundError: no such response in the request log, or its release is not installed.
    """
    from resources.requests import find

    record = find(settings, response_id)
    if record is None:
        raise NotFoundError(
            f"No response {response_id!r} in the request log.",
            where=str(settings.requests_dir),
            next="a response is logged within seconds; copy the id from the header "
            "x-ratchet-response-id",
        )
    release = read_installed(record.release, settings)
    runs = Runs(settings)
    return {
        "response": {
            "id": record.response_id,
            "time": record.time,
            "question": record.question,
            "answer": record.answer,
            "cited": record.cited,
            "refused": record.refused,
        },
        "release": {
            "id": release.id,
            "git_commit": release.git_commit,
            "gate": release.gate.get("verdict"),
            "prompt": f"{release.prompt['name']}/{release.prompt['version']}",
            "model": release.model.get("name"),
            "let_in": let_in(record, settings),
        },
        "inputs": inputs(release),
        "members": {
            name: {"path": member.path, "md5": member.md5} | runs.of(member.md5)
            for name, member in sorted(
                release.members.items(),
                key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER),
            )
        },
        "chunks": [
            _chunk(number, chunk_id, record, release, settings)
            for number, chunk_id in enumerate(record.chunk_ids, start=1)
        ],
        "mlflow": runs.state,
    }


def let_in(record: RequestRecord, settings: Settings) -> str:
    """The row of the ledger with which the response's release came onto its channel, or why there
    is none."""
    from resources import ledger

    try:
        rows = ledger.Ledger.open(settings).entries(
            channel=record.channel, kinds=ledger.CHANGES, until=datetime.fromisoformat(record.time)
        )
        row = ledger.let_in(rows, record.release)
    except RatchetError as error:
        return f"the ledger does not say: {error.what}"
    if row is None:
        return "the ledger does not say: no row brought it onto this channel before the answer"
    return f"{row}{': ' if row.reason else ''}{' '.join(row.reason.split())}"


def inputs(release: Release) -> dict[str, str]:
    """Digests that a release names besides its members'."""
    known = {member.md5 for member in release.members.values()}
    model = {
        key: value
        for key, value in release.model.items()
        if key.endswith("_md5") and value not in known
    }
    found = {
        "prompt": f"sha256 {release.prompt['sha256']}",
        "eval_set": f"md5 {release.eval_set}",
        "params": f"sha256 {text_sha(json.dumps(release.params, sort_keys=True))}",
        **{key.removesuffix("_md5"): f"md5 {value}" for key, value in sorted(model.items())},
    }
    if policy := release.gate.get("policy_sha256"):
        found["gate policy"] = f"sha256 {policy}"
    return found


def read_installed(release_id: str, settings: Settings) -> Release:
    """The release.json of an installed release."""
    path = settings.releases_dir / release_id / "release.json"
    try:
        return Release.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"Release {release_id} is not installed here.",
            where=str(path),
            next="trace on the machine that served it, or deploy that release again",
        ) from None


class Runs:
    """MLflow's runs by DVC digest. Without a tracking store the trace goes on and says so."""

    def __init__(self, settings: Settings) -> None:
        self.state = settings.mlflow_uri
        try:
            from resources.tracking import Tracking

            self.tracking: Tracking | None = Tracking(settings)
        except RatchetError as error:
            self.tracking, self.state = None, f"unavailable: {error.what}"

    def of(self, md5: str) -> dict[str, Any]:
        """The newest run that made ``md5``: MLflow run id, Dagster run id, commit, driver."""
        found = self.tracking.stage_runs(md5) if self.tracking else []
        if not found:
            return {}
        tags = found[0].data.tags
        return {
            "mlflow_run": found[0].info.run_id,
            "dagster_run": tags.get("dagster/run_id"),
            "driver": tags.get("ratchet.driver"),
            "git_commit": tags.get("mlflow.source.git.commit"),
        }


def _chunk(
    number: int, chunk_id: str, record: RequestRecord, release: Release, settings: Settings
) -> dict[str, Any]:
    """One passage of the answer, down to its file."""
    doc_id, _, span = chunk_id.rpartition("#")
    start, _, end = span.partition("-")
    value: dict[str, Any] = {
        "n": number,
        "cited": number in record.cited,
        "chunk_id": chunk_id,
        "score": record.scores[number - 1],
    }
    document = _document(doc_id, release, settings)
    if document is None:
        return value | {"document": f"{doc_id}: not in this checkout's DVC cache; run `dvc pull`"}
    text = document["text"][int(start) : int(end)]
    value["text"] = text if len(text) <= 200 else text[:200] + " …"
    value["document"] = {key: document[key] for key in ("doc_id", "source", "path", "md5")}
    if document["git_path"]:
        value["file"] = _file(document["git_path"], document["md5"], release, settings.root)
    return value


def _document(doc_id: str, release: Release, settings: Settings) -> dict[str, Any] | None:
    """The document's row from the very documents that the release names."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from resources.tracking import resolve_dvc

    member = release.members["documents"]
    try:
        found = resolve_dvc(member.path, member.md5, settings.root)
        paths = _parquets(found, settings.root)
    except (NotFoundError, OSError, ValueError):
        return None
    for path in paths:
        table = pq.read_table(path)
        rows = table.filter(pc.equal(table["doc_id"], doc_id)).to_pylist()
        if rows:
            row: dict[str, Any] = rows[0]
            return row
    return None


def _parquets(found: Path, root: Path) -> list[Path]:
    """The Parquet files of a documents folder: as they lie, or by its manifest in the cache."""
    if found.is_dir():
        return sorted(found.glob("*.parquet"))
    cache = root / ".dvc" / "cache" / "files" / "md5"
    manifest = json.loads(found.read_text(encoding="utf-8"))
    return [cache / row["md5"][:2] / row["md5"][2:] for row in manifest]


def _file(git_path: str, md5: str, release: Release, root: Path) -> dict[str, Any]:
    """Where the file's bytes are today: the working tree, or git at the release's commit."""
    import hashlib

    path = root / git_path
    if path.is_file() and file_md5(path) == md5:
        where = "working tree"
    else:
        shown = subprocess.run(
            ["git", "show", f"{release.git_commit}:{git_path}"],
            cwd=root, capture_output=True, check=False,
        )  # fmt: skip
        same = (
            shown.returncode == 0
            and hashlib.md5(shown.stdout, usedforsecurity=False).hexdigest() == md5
        )
        where = f"git {release.git_commit[:12]}" if same else "changed since, uncommitted then"
    return {"path": git_path, "md5": md5, "git_commit": release.git_commit, "bytes_in": where}


def render(value: dict[str, Any]) -> str:
    """The trace as a tree for a terminal."""
    response, release = value["response"], value["release"]
    lines = [
        f"response {response['id']}  ({response['time']})",
        f"  question  {response['question']}",
        f"  answer    {response['answer']}",
        f"└─ release {release['id']}   gate {release['gate']}   git {release['git_commit'][:12]}",
        f"   prompt {release['prompt']}   model {release['model']}",
        f"   let in: {release['let_in']}",
    ]
    lines += [f"   ├─ {name:<12} {digest}" for name, digest in value["inputs"].items()]
    for name, member in value["members"].items():
        lines.append(f"   ├─ {name:<12} {member['md5']:<36}  {member['path']}")
        if member.get("mlflow_run"):
            made = f"mlflow {member['mlflow_run'][:12]}"
            if member.get("dagster_run"):
                made += f"   dagster {member['dagster_run'][:8]}"
            lines.append(f"   │    made by {member['driver']}: {made}")
    for chunk in value["chunks"]:
        mark = "cited" if chunk["cited"] else "shown"
        lines.append(
            f"   └─ [{chunk['n']}] {mark}  {chunk['chunk_id']}  score {chunk['score']:.3f}"
        )
        if isinstance(chunk.get("document"), str):
            lines.append(f"        {chunk['document']}")
            continue
        lines.append(f"        “{' '.join(chunk['text'].split())}”")
        if file := chunk.get("file"):
            lines.append(f"        {file['path']}  md5 {file['md5']}  ({file['bytes_in']})")
        else:
            document = chunk["document"]
            lines.append(
                f"        {document['path']} of source {document['source']}  md5 {document['md5']}"
            )
    return "\n".join(lines)
