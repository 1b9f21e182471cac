"""The vector index: immutable, named by its content, searched by likeness, by words, or by both.

One interface (:class:`VectorIndex`), two engines: a qdrant-edge directory searched in-process
(``edge``), and a collection of a Qdrant server (``server``, imported by who needs it).
"""

from __future__ import annotations

from resources.index.build import build_index
from resources.index.edge import EdgeIndex, open_index
from resources.index.filters import hide
from resources.index.manifest import MANIFEST, certify, content_id, documents, read_manifest
from resources.index.search import Asked, Hit, VectorIndex
from resources.index.shards import ShardCache

__all__ = [
    "MANIFEST",
    "Asked",
    "EdgeIndex",
    "Hit",
    "ShardCache",
    "VectorIndex",
    "build_index",
    "certify",
    "content_id",
    "documents",
    "hide",
    "open_index",
    "read_manifest",
]
