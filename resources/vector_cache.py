"""Vectors by the text they stand for, and what every embedder does with them.

In: texts. Out: float32 vectors, byte for byte as they were first computed, from a cache that all
versions of the knowledge base share; only text that it lacks is computed. One SQLite file a model
and way of computing: a change of either embeds everything again, under a new name, and the way back
finds its own file still there. See ``resources.content_cache`` for what happens to damaged ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import text_sha
from resources.content_cache import ContentCache

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

#: Called after each batch with (texts done, texts to do).
Progress = Callable[[int, int], None]


class CachedEmbedder(ABC):
    """What torch's and a server's embedders have in common. Subclasses compute."""

    model: str
    dtype: str
    dimension: int
    #: Tokens of text that the model reads, under :attr:`tokenizer`, special ones excluded.
    max_tokens: int

    def __init__(self, cache_dir: Path | None) -> None:
        self._cache_dir = cache_dir
        #: Of the last :meth:`embed`: how many texts came from the cache, how many were computed.
        self.cached = self.computed = 0

    @property
    @abstractmethod
    def digest(self) -> str:
        """Names the model, in hex: equal digests mean vectors that can be compared."""

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Names all that the bits of a vector follow from, besides its text."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Counts tokens: neither truncates nor pads."""

    @abstractmethod
    def warm(self) -> None:
        """Do now what the first question would otherwise wait for."""

    @abstractmethod
    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        """As :meth:`embed`, but not cached, and each at what one question costs."""

    @abstractmethod
    def compute(self, texts: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
        """Vectors of texts by their keys, batch by batch in any order, none twice."""

    @cached_property
    def cache(self) -> VectorCache | None:
        if self._cache_dir is None:
            return None
        return VectorCache(self._cache_dir / f"{self.cache_name}.sqlite", self.dimension)

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        """Vectors of ``texts``: float32, (len(texts), dimension), each of length 1.

        Only texts that are neither cached nor repeated are computed. Each batch is in the cache
        before the next is waited for, so an interrupted call resumes where it was.
        """
        import numpy as np

        keys = [text_sha(text) for text in texts]
        known = self.cache.get(sorted(set(keys))) if self.cache is not None else {}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        self.cached, self.computed = len(set(keys)) - len(new), len(new)
        done = 0
        for fresh in self.compute(new) if new else ():
            if self.cache is not None:  # an empty cache is false
                self.cache.put(fresh)
            known.update(fresh)
            done += len(fresh)
            if progress:
                progress(done, len(new))
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return np.stack([known[key] for key in keys])

    def describe(self) -> dict[str, Any]:
        """What an index's manifest says of its model: enough to make an embedder that fits."""
        return {
            "name": self.model,
            "dtype": self.dtype,
            "digest": self.digest,
            "dimension": self.dimension,
        }


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
