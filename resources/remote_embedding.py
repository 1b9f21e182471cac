"""Vectors from a server that speaks the OpenAI API (``POST /v1/embeddings``), any such server.

In: texts. Out: what ``resources.embedding`` gives, from the same kind of cache: float32, length 1.
What comes back is checked before it is believed: one vector a text, placed by its ``index``, of the
dimension that params.yaml states, of finite numbers. A server that is busy (429), fails (5xx),
hangs or drops the connection is asked again, later and later, until a deadline; what it says in
``Retry-After`` is kept to.

The cache is named after the model and the dimension, not after the address: the server may move.
The bits of a vector are the server's affair, and may change from call to call; the first ones that
were cached stay. Why urllib3: the callers are threads, it pools connections between them, and a
question costs no handshake. aiohttp would need an event loop beside them, and the ``openai`` client
is not among the libraries that serving installs, nor has it a deadline.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import ConfigError, ServiceError
from contracts.params import Vectors
from contracts.settings import Settings
from resources.embedding import load_tokenizer, read_limit
from resources.vector_cache import CachedEmbedder

if TYPE_CHECKING:
    import numpy as np
    import urllib3
    from tokenizers import Tokenizer

#: Requests under way at once: enough to hide a network's delay, few enough for a small server.
CONCURRENT = 4

#: Answers that may be another one a moment later.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

#: A 64-text answer of 3,072 numbers a text is 4 MB of JSON; more than this is no such answer.
MAX_ANSWER_BYTES = 256 << 20

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds; doubled at every try, then drawn from half to all

#: What a model reads where its folder does not say: the least of what is commonly served.
COMMON_LIMIT = 510


class RemoteEmbedder(CachedEmbedder):
    """A server's embedding model with a cache.

    Args:
        model: the server's name of it.
        dimension: of its vectors; another one is refused.
        url: the server, with or without ``/v1``.
        counting: folder of the tokenizer that counts tokens; the server's own may be unknown.
        key: sent as a bearer token; None sends none.
        batch: texts a request.
        timeout: seconds without a byte after which a try is given up.
        deadline: seconds after which a request is given up, with all its tries.
    """

    def __init__(
        self,
        model: str,
        dimension: int,
        url: str,
        counting: Path,
        *,
        key: str | None = None,
        cache_dir: Path | None = None,
        batch: int = 64,
        timeout: float = 60.0,
        deadline: float = 300.0,
    ) -> None:
        super().__init__(cache_dir)
        self.model, self.dtype, self.dimension, self.batch = model, "remote", dimension, batch
        base = url.rstrip("/").removesuffix("/v1")
        self._address, self._key = f"{base}/v1/embeddings", key
        self._timeout, self._deadline = timeout, deadline
        self._counting = counting
        limited = (counting / "sentence_bert_config.json").is_file()
        self.max_tokens = read_limit(counting) if limited else COMMON_LIMIT

    @classmethod
    def of(cls, vectors: Vectors, counting: Path, cache_dir: Path | None) -> RemoteEmbedder:
        """The embedder of params.yaml's block ``vectors``. ConfigError without an address."""
        settings = Settings.from_env()
        if settings.embeddings_url is None or vectors.dimension is None:
            raise ConfigError(
                "The embedding model is a server's, and the server's address is not set.",
                where="params.yaml: vectors.backend",
                next="set EMBEDDINGS_URL, e.g. http://127.0.0.1:8000, or vectors.backend: torch",
            )
        return cls(
            vectors.model,
            vectors.dimension,
            settings.embeddings_url,
            counting,
            key=settings.embeddings_api_key,
            cache_dir=cache_dir,
            batch=vectors.batch,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of model name and dimension: all that is known of a server's model."""
        return hashlib.sha256(f"openai-1 {self.model} {self.dimension}".encode()).hexdigest()

    @property
    def cache_name(self) -> str:
        return self.digest[:32]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._counting)

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        import urllib3

        return urllib3.PoolManager(maxsize=CONCURRENT, block=False, retries=False)

    def warm(self) -> None:
        self._ask(["warm"])

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        import numpy as np

        parts = [texts[start : start + self.batch] for start in range(0, len(texts), self.batch)]
        empty = np.zeros((0, self.dimension), dtype=np.float32)
        return np.concatenate([empty, *(self._ask(part) for part in parts)])

    def compute(self, texts: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
        """Longest first, so that a request's texts are of about one length."""
        keys = sorted(texts, key=lambda key: (-len(texts[key]), key))
        batches = [keys[start : start + self.batch] for start in range(0, len(keys), self.batch)]

        over = threading.Event()

        def ask(batch: list[str]) -> dict[str, np.ndarray]:
            return dict(zip(batch, self._ask([texts[key] for key in batch], over), strict=True))

        with ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                yield from pool.map(ask, batches)
            finally:
                over.set()  # whoever waits for a next try gives up at once
                pool.shutdown(cancel_futures=True)

    def _ask(self, texts: Sequence[str], over: threading.Event | None = None) -> np.ndarray:
        """One request with its tries: float32, (len(texts), dimension). Raises ServiceError.

        Args:
            over: set when nobody waits for the answer any longer.
        """
        import urllib3

        over = over or threading.Event()
        until = time.monotonic() + self._deadline
        pause, tries = FIRST_PAUSE, 0
        while True:
            tries += 1
            wait = None
            try:
                status, headers, body = self._post(texts, until)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return self._read(body, len(texts))
                problem = f"it answered {status}: {excerpt(body)}"
                if status not in PASSING:
                    raise self._refused(status, problem)
                wait = retry_after(headers.get("Retry-After"))
            if wait is None:
                wait = pause * random.uniform(0.5, 1)
                pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() + wait >= until or over.wait(wait):
                raise self._error(
                    f"The embedding server was asked {tries} times and gave no vectors within "
                    f"{self._deadline:.0f} s (next try in {wait:.0f} s); at last: {problem}",
                    next="see whether it runs, then run the stage again: what is done is cached",
                )

    def _post(self, texts: Sequence[str], until: float) -> tuple[int, Mapping[str, str], bytes]:
        """One try: status, headers and body, all of it read before ``until``."""
        import urllib3

        cut = [self._cut(text) for text in texts]
        body = {"model": self.model, "input": cut, "encoding_format": "float"}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        left = max(until - time.monotonic(), 0.01)
        response = self._pool.request(
            "POST",
            self._address,
            body=json.dumps(body).encode(),
            headers=headers,
            timeout=urllib3.Timeout(connect=min(10.0, left), read=min(self._timeout, left)),
            redirect=False,  # the key goes to no other address
            preload_content=False,
        )
        parts = bytearray()
        while part := response.read1(1 << 20):
            parts += part
            if time.monotonic() > until:  # a server that drips never meets the read timeout
                response.close()
                raise TimeoutError(f"the answer was not whole after {self._deadline:.0f} s")
            if len(parts) > MAX_ANSWER_BYTES:
                response.close()
                raise self._error(f"The embedding server's answer exceeds {MAX_ANSWER_BYTES} bytes")
        response.release_conn()
        return response.status, response.headers, bytes(parts)

    def _cut(self, text: str) -> str:
        """What the model reads of a text: servers refuse a longer one, and ours cuts it too."""
        if len(text) <= self.max_tokens:  # a token has at least one character
            return text
        ends = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(ends) <= self.max_tokens else text[: ends[self.max_tokens - 1][1]]

    def _read(self, body: bytes, count: int) -> np.ndarray:
        """The vectors of an answer in the order of the texts. Raises ServiceError."""
        import numpy as np

        try:
            items = json.loads(body)["data"]
            places = [int(item["index"]) for item in items]
            rows = [np.asarray(item["embedding"], dtype=np.float64) for item in items]
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(
                f"The embedding server's answer is no list of vectors ({type(error).__name__}: "
                f"{error}): {excerpt(body)}"
            ) from None
        if sorted(places) != list(range(count)):
            raise self._error(
                f"The embedding server was given {count} texts and returned {len(places)} vectors, "
                f"for the places {sorted(places)[:5]} and so on."
            )
        shapes = sorted({row.shape for row in rows} - {(self.dimension,)})
        if shapes:
            raise self._error(
                f"The embedding server's vectors have {' x '.join(map(str, shapes[0])) or 'no'} "
                f"numbers; vectors.dimension is {self.dimension}.",
                next="correct vectors.dimension or vectors.model in params.yaml",
            )
        vectors = np.stack(rows)[np.argsort(places)]
        lengths = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if len(wrong):
            raise self._error(
                f"The embedding server returned {len(wrong)} of {count} vectors that are not "
                "finite, or all zero."
            )
        unit: np.ndarray = (vectors / lengths[:, None]).astype(np.float32)
        return unit

    def _refused(self, status: int, problem: str) -> ServiceError:
        steps = {
            401: "set EMBEDDINGS_API_KEY to a key that the server accepts",
            403: "set EMBEDDINGS_API_KEY to a key that the server accepts",
            404: "correct EMBEDDINGS_URL, or vectors.model in params.yaml",
        }
        return self._error(f"The embedding server refuses: {problem}", next=steps.get(status))

    def _error(self, what: str, next: str | None = None) -> ServiceError:
        step = next or f"ask the server's operator; the model asked for is {self.model}"
        return ServiceError(what, where=self._address, next=step)


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, as a number or a date; else None."""
    import urllib3

    try:
        return max(0.0, urllib3.util.Retry().parse_retry_after(value)) if value else None
    except urllib3.exceptions.InvalidHeader:
        return None


def excerpt(body: bytes, limit: int = 300) -> str:
    """The beginning of a body as one printable line."""
    return " ".join(body[: 4 * limit].decode("utf-8", "replace").split())[:limit] or "(empty)"
