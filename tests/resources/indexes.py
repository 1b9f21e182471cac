"""Small indexes for the tests of searching and publishing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contracts.digests import text_sha
from contracts.params import Index
from contracts.records import Chunk
from resources.index import build_index, certify
from resources.published import Policy

MODEL: dict[str, Any] = {"name": "test", "dtype": "float32", "digest": "d" * 64, "dimension": 8}
PARAMS = Index(hnsw_m=16, ef_construct=64, exact_below=50_000, min_recall=0.9, probes=20)
METRIC = "recall_at_10"


def chunk(doc_id: str, start: int, text: str, **more: Any) -> Chunk:
    source, _, path = doc_id.partition(":")
    end = start + len(text)
    return Chunk(
        chunk_id=f"{doc_id}#{start}-{end}", doc_id=doc_id, source=source, path=path, title="T",
        heading="H", start=start, end=end, tokens=len(text.split()), text_sha=text_sha(text),
        text=text, **more,
    )  # fmt: skip


def vectors_of(chunks: Sequence[Chunk], dimension: int = 8) -> np.ndarray:
    """A unit vector that follows from the text alone."""
    rows = [
        np.random.default_rng(int(item.text_sha[:8], 16)).normal(size=dimension) for item in chunks
    ]
    found = np.array(rows, dtype=np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)


def make_index(path: Path, documents: Sequence[str], recall: float = 1.0, tag: str = "") -> Path:
    """An index of two chunks a document; ``tag`` stands in every text, so it names the version."""
    chunks = [
        chunk(f"docs:{name}", n, f"{name} part {n} {tag}") for name in documents for n in (0, 90)
    ]
    build_index(path, chunks, vectors_of(chunks), PARAMS, MODEL)
    certify(path, {METRIC: recall, "worst_probe": recall})
    return path


def policy_for(index: Path, golden: float = 0.9, keep: int = 3) -> Policy:
    """A policy whose report says that ``index`` was tried, beside the index."""
    content = json.loads((index / "manifest.json").read_text())["content"]
    report = index.with_name(index.name + "-report.json")
    report.write_text(json.dumps({"index": content, "metrics": {METRIC: golden}}))
    return Policy(min_recall=0.9, report=report, metric=METRIC, min_golden=0.6, keep=keep)
