"""Suites of Great Expectations over data frames, and their results as plain rows.

In: for each frame a suite of (what it demands in words, the expectation). Out: a row for each, in
the order of the suites: expectation, rule (GX's name), over, column, bound, observed, success.
Importing GX costs 2.3 CPU seconds, so it is imported once here, with one context and one call a
frame (a call an expectation reads the frame anew each time: 3 times as slow at 10,000 rows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Suite = Sequence[tuple[str, Any]]


def validate(frames: Mapping[str, tuple[pd.DataFrame, Suite]]) -> list[Row]:
    """The results of every suite over its frame; keys say in a word what the rows are."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    rows: list[Row] = []
    for over, (frame, suite) in frames.items():
        source = context.data_sources.add_pandas(over)
        whole = source.add_dataframe_asset(over).add_batch_definition_whole_dataframe("whole")
        for number, (_, expectation) in enumerate(suite):
            expectation.meta = {"number": number}  # GX returns results in an order of its own
        batch = whole.get_batch(batch_parameters={"dataframe": frame})
        results = batch.validate(
            gx.ExpectationSuite(name=over, expectations=[item for _, item in suite])
        ).results
        results.sort(key=lambda item: item.expectation_config.meta["number"])
        rows += [_row(words, over, item) for (words, _), item in zip(suite, results, strict=True)]
    return rows


def _row(words: str, over: str, result: Any) -> Row:
    config = result.expectation_config
    bound = {
        key: value
        for key, value in config.kwargs.items()
        if key not in ("batch_id", "column") and value is not None
    }
    return {
        "expectation": words,
        "rule": config.type,
        "over": over,
        "column": config.kwargs.get("column"),
        "bound": bound,
        "observed": observed(result),
        "success": bool(result.success),
    }


def observed(result: Any) -> str:
    """What an expectation saw, in one short line without memory addresses or dates."""
    if result.exception_info and result.exception_info.get("raised_exception"):
        return f"could not be judged: {result.exception_info.get('exception_message')}"
    seen = result.result
    if "observed_value" in seen:
        value = seen["observed_value"]
        if isinstance(value, float):
            return "no rows" if math.isnan(value) else f"{value:.4g}"
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    count = seen.get("unexpected_count", 0)
    if not count:
        return f"all {seen.get('element_count', 0)} rows"
    few = ", ".join(repr(item)[:40] for item in seen.get("partial_unexpected_list", [])[:3])
    return f"{count} of {seen.get('element_count')} rows do not, e.g. {few}"
