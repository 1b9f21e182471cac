"""Vectors by the text they stand for: float32, byte for byte as they were computed.

In: SHA-256 of texts. Out: their vectors. One file a model digest; see ``resources.content_cache``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources.content_cache import ContentCache

if TYPE_CHECKING:
    import numpy as np


class VectorCache:
    """The cache of one model. ``dimension`` is checked on every row."""

    def __init__(self, path: Path, dimension: int) -> None:
        self.path = path
        self._entries, self._dimension = ContentCache(path), dimension

    def get(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Vectors of those keys (hex SHA-256) that are present and whole."""
        import numpy as np

        return {
            key: np.frombuffer(value, dtype="<f4")
            for key, value in self._entries.get(keys).items()
            if len(value) == 4 * self._dimension
        }

    def put(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Store float32 vectors under their keys, all or none of them."""
        self._entries.put({key: row.astype("<f4").tobytes() for key, row in vectors.items()})

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        self._entries.close()
