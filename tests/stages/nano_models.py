"""The real nano recipe in the small, for tests: a page of text and knobs of a tiny model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.nano.corpus import Section, Text

TOPICS = {
    "Releases": "A release names every input by its digest. The id of a release is a hash. "
    "A rollback moves the stable channel to an older release. Nobody may edit a release by hand. "
    "The deployment checks the health of the engine before the pointer moves.",
    "Gates": "The gate compares the candidate with the stable release. A missing score is invalid. "
    "Floors are the lowest mean scores that a metric may have. The verdict explains its reasons. "
    "A failing gate stops the pipeline and keeps the older release.",
    "Sizing": "The engine needs memory for weights and for the cache of keys and values. "
    "Two processor cores serve about twenty requests each second. Long prompts cost more memory. "
    "The planner refuses a launch that does not fit the budget of the machine.",
    "Drift": "Drift means that questions change over time. The nightly job compares yesterday "
    "with the reference. A small sample gives no verdict at all. The sensor asks for retraining. "
    "People should read twenty questions before they trust an alarm.",
}


class Knobs(SimpleNamespace):
    """As contracts.params.Nano, as far as the recipe looks at it."""

    def model_dump(self) -> dict[str, Any]:
        return dict(vars(self))


def texts() -> list[Text]:
    """Four pages of two sections each."""
    pages = []
    for title, words in TOPICS.items():
        sentences = words.split(". ")
        halves = [". ".join(sentences[:3]) + ".", ". ".join(sentences[2:])]
        pages.append(
            Text(title, tuple(Section(f"{title} part {n}", half) for n, half in enumerate(halves)))
        )
    return pages


def knobs(**changed: Any) -> Knobs:
    values: dict[str, Any] = dict(  # noqa: C408 - names as in params.yaml
        hidden=320, layers=3, heads=5, vocab=900, steps=3, batch=1, context=384,
        learning_rate=5e-4, seed=7, threads=1, corpus_md5="",
    )  # fmt: skip
    return Knobs(**(values | changed))
