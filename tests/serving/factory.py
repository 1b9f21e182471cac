"""A small checkout with a release in it, of the real shape: every digest is right.

The index is a JSON file of chunks (real indexes need a model; here routing, switching and logging
are tested), everything else is what the stages write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.digests import path_md5, path_size
from contracts.params import Vectors
from contracts.records import Channel, Chunk, Filter, Release
from contracts.settings import Settings
from resources import prompts, releases
from resources.index.manifest import DOCUMENTS
from resources.published_reader import Tombstones
from resources.rag import Rag
from serving.gateway.live import Live

TEMPLATE = """{% block system %}
Answer from the passages. (MARK)
{% for p in passages %}
[{{ p.n }}] {{ p.title }} > {{ p.heading }}: {{ p.text }}
{% endfor %}
{% endblock %}
{% block user %}
{{ question }}
{% endblock %}
"""
ANSWERS = {"prompt": "answer", "top_k": 3, "max_tokens": 96, "min_score": 0.2}
VECTORS = {"model": "all-MiniLM-L6-v2", "batch": 8, "dtype": "float32"}
LAUNCH = {
    "engine": "vllm", "model": "checkpoint", "served_model_name": "nano",
    "args": {"dtype": "bfloat16", "max-model-len": 1024}, "env": {},
}  # fmt: skip


def chunk(n: int, text: str, mark: str = "") -> Chunk:
    return Chunk(
        chunk_id=f"docs:page{n}.md#{n}-{n + len(text)}", doc_id=f"docs:page{n}.md", source="docs",
        path=f"page{n}.md", title=f"Page {n}", heading=f"Heading {n}", start=n,
        end=n + len(text), tokens=8, text_sha="0" * 64, text=f"{text}{mark}",
    )  # fmt: skip


def build(
    root: Path,
    mark: str = "one",
    *,
    versions: dict[str, str] | None = None,
    tags: str = "stable: v1\n",
    **changes: Any,
) -> Path:
    """Write members and ``data/release.json`` under ``root``; return the release file.

    ``mark`` stands in the prompt and in every chunk, so that a mix of two releases shows.
    ``versions`` are more versions of the prompt, by name. ``changes``
    replaces fields of the release before its id is computed.
    """
    data = root / "data"
    for folder in ("index", "bundle/checkpoint", "prompts/answer"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    chunks = [chunk(n, f"Fact {n} of ", mark).model_dump() for n in (1, 2, 3, 4)]
    (data / "index" / "chunks.json").write_text(json.dumps(chunks))
    documents = sorted(item["doc_id"] for item in chunks)
    (data / "index" / DOCUMENTS).write_text(json.dumps(documents))
    (data / "chunks.parquet").write_bytes(b"PAR1" + mark.encode())
    (data / "bundle" / "launch.json").write_text(json.dumps(LAUNCH))
    (data / "bundle" / "checkpoint" / "config.json").write_text(json.dumps({"mark": mark}))
    source = data / "prompts"
    (source / "answer" / "v1.jinja2").write_text(TEMPLATE.replace("MARK", mark))
    for name, text in (versions or {}).items():
        (source / "answer" / f"{name}.jinja2").write_text(text)
    (source / "answer" / "tags.yaml").write_text(tags)
    loaded = prompts.load(source)
    (data / "prompts.json").write_text(json.dumps(loaded.to_json()))
    prompt = loaded.get("answer")
    members = {
        "index": "data/index", "bundle": "data/bundle", "prompts": "data/prompts.json",
        "chunks": "data/chunks.parquet",
    }  # fmt: skip
    body: dict[str, Any] = {
        "members": {
            key: {"path": path, "md5": path_md5(root / path), "size": path_size(root / path)}
            for key, path in members.items()
        },
        "prompt": {"name": prompt.name, "version": prompt.version, "sha256": prompt.sha256},
        "model": {"name": "nano"},
        "gate": {"verdict": "PASS"},
        "eval_set": "0" * 32,
        "params": {"answers": ANSWERS, "vectors": VECTORS},
        "git_commit": "0" * 40,
        **changes,
    }
    body["id"] = Release.compute_id(body)
    path = data / "release.json"
    path.write_text(json.dumps(body))
    return path


@dataclass
class Hit:
    chunk: Chunk
    score: float


class JsonIndex:
    """Finds the first k chunks, best first; nothing is near a question with "unrelated" in it."""

    def __init__(self, path: Path) -> None:
        rows = json.loads((path / "chunks.json").read_text())
        self.chunks = [Chunk.model_validate(row) for row in rows]

    def search(self, vector: Any, k: int, *, only: Filter | None = None, **_: Any) -> list[Hit]:
        near, hidden = float(vector[0]), only.without_documents if only else []
        found = [item for item in self.chunks if item.doc_id not in hidden]
        return [Hit(item, near - n / 100) for n, item in enumerate(found[:k])]


class LengthEmbedder:
    """A vector that says whether the question is related to anything."""

    def embed(self, texts: list[str]) -> Any:
        return np.array([[0.0 if "unrelated" in text else 0.9] for text in texts], np.float32)

    embed_questions = embed


def open_json_live(settings: Settings) -> Any:
    """An opener for JsonIndex releases; all else is the real thing."""

    def open_live(channel: Channel) -> Live:
        installed = releases.load(settings, channel.release)
        answers = installed.answers
        Vectors.model_validate(installed.release.params["vectors"])
        hidden = Tombstones(settings, installed.index)
        rag = Rag(
            JsonIndex(installed.index),
            LengthEmbedder(),
            installed.prompt(),
            top_k=answers.top_k,
            min_score=answers.min_score,
            only=hidden,
        )
        return Live(channel, installed, rag, answers.max_tokens, installed.prompts(), hidden)

    return open_live


def point(settings: Settings, release_id: str, url: str, name: str = "stable") -> None:
    """Flip a channel as a deployment does."""
    releases.write_channel(
        settings, Channel(name=name, release=release_id, engine_url=url, model="nano")
    )
