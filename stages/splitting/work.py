"""Splitting many texts: what a process of the stage chunks, or a task on a Ray node, does.

In: texts with their structure. Out: their spans as JSON, ``[[start, end, tokens, heading], …]``,
which is also what the cache keeps. A process loads the tokenizer once and remembers its words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from contracts.records import Heading
from resources.embedding import find_model, load_tokenizer
from stages.splitting import Strategy, WordCounter, split


@dataclass(frozen=True)
class Recipe:
    """What a split follows from, besides the document."""

    model: str  # whose tokenizer counts: resources.embedding.counting_model
    max_tokens: int
    strategy: Strategy


@dataclass(frozen=True)
class Item:
    """What a split follows from, of the document."""

    text: str
    format: str
    language: str
    headings: Sequence[Heading]


@lru_cache(maxsize=1)
def counter(model: str) -> WordCounter:
    """This process's counter for an embedding model. Raises ConfigError."""
    return WordCounter(load_tokenizer(find_model(model)))


def split_batch(recipe: Recipe, items: list[Item]) -> list[bytes]:
    """The spans of each item, as JSON."""
    return [
        json.dumps(
            [
                [span.start, span.end, span.tokens, span.heading]
                for span in split(
                    item.text,
                    recipe.max_tokens,
                    counter(recipe.model),
                    format=item.format,
                    strategy=recipe.strategy,
                    language=item.language,
                    headings=item.headings,
                )
            ],
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()
        for item in items
    ]
