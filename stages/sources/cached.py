"""Parsed files by the hash of their bytes: what was read once is not parsed again.

The recipe (this code, the versions of the parsers) is in the cache's file name, so a new parser
starts an empty cache. Answers that a bound cut short are not kept: another machine may do better.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from contracts.settings import Settings
from resources.content_cache import ContentCache
from stages.sources.parse import Item, Parsed, parse_batch

PARSERS = (
    *("beautifulsoup4", "lxml", "markdownify", "mammoth", "pypdf", "pygments"),
    "lingua-language-detector",
)
#: Files of one task of Ray: enough to pay for the children that parse them.
RAY_BATCH = 128

Parse = Callable[[Sequence[Item]], list[Parsed]]


def parser(engine: str) -> Parse:
    """``parse_batch``, here or on Ray's workers; the same answers either way."""
    if engine == "local":
        return parse_batch
    from resources.ray_data import map_batches

    return lambda items: map_batches(items, partial(parse_batch, children=1), RAY_BATCH)


def open_cache() -> ContentCache:
    folder = Settings.from_env().caches_dir
    return ContentCache(folder / f"documents-{recipe()}.sqlite")


def recipe() -> str:
    """16 hex digits over the code and the libraries that an answer follows from."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), here.parent / "markdown.py"]:
        digest.update(file.read_bytes())
    for name in PARSERS:
        digest.update(f"{name}=={version(name)}\n".encode())
    return digest.hexdigest()[:16]


def parse_cached(items: Sequence[Item], cache: ContentCache, parse: Parse) -> list[Parsed]:
    """Every item parsed, in order; only those that the cache lacks are computed, each once."""
    keys = [hashlib.sha256(kind.encode() + b"\0" + data).hexdigest() for kind, data in items]
    known = {key: json.loads(value) for key, value in cache.get(list(dict.fromkeys(keys))).items()}
    missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
    if missing:
        fresh = dict(zip(missing, parse(list(missing.values())), strict=True))
        cache.put(
            {
                key: json.dumps(parsed).encode()
                for key, parsed in fresh.items()
                if not parsed.get("limit")
            }
        )
        known |= fresh
    return [known[key] for key in keys]
