"""Scores of live answers, from rows of the request log and the chunks that they were made from.

In: a row (``contracts.records.RequestRecord``, or a mapping with its fields) and the texts of the
chunks of the release that answered. Out: the deterministic scores that need no reference. The
nightly run and a rollout both score by this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contracts.records import REFUSAL, RequestRecord
from resources.scorers.deterministic_scorer import DeterministicScorer
from resources.scorers.scorer import Item, Score

_SCORER = DeterministicScorer()


def score_record(record: RequestRecord, chunks: Mapping[str, str]) -> list[Score]:
    """Deterministic scores of one request.

    Args:
        record: the request as the log keeps it.
        chunks: text by chunk id, of the release that answered (``record.release``): an id names a
            span, and its text may differ from release to release.

    Returns:
        Nothing for a request that failed, and for one that no release answered: a plain model
        cites nothing, and errors are counted elsewhere. Else ``refusal`` (1.0 refused, 0.0
        answered) and, of an answer that is no refusal, ``citation_in_context`` and ``grounded``
        (0.0 or 1.0; INVALID where a passage that was shown is not among ``chunks``). No metric
        raises and nothing waits.
    """
    return score_row(record.model_dump(), chunks)


def score_row(row: Mapping[str, Any], chunks: Mapping[str, str]) -> list[Score]:
    """As :func:`score_record`, of a mapping; columns may have come through pandas."""
    item = item_of(row, chunks)
    return [] if item is None else _SCORER.score([item])[0]


def item_of(row: Mapping[str, Any], chunks: Mapping[str, str]) -> Item | None:
    """The row as an item; None for a request that failed or that no release answered."""
    if not answered(row) or not row.get("release"):
        return None
    ids = _ids(row)
    lost = sum(name not in chunks for name in ids)
    refused = bool(row.get("refused"))  # the gateway's word for it counts
    return Item(
        id=str(row.get("response_id") or ""),
        question=str(row.get("question") or ""),
        answer=REFUSAL if refused else str(row.get("answer") or ""),
        passages={n: chunks[name] for n, name in enumerate(ids, start=1) if name in chunks},
        lost=f"{lost} of {len(ids)} passages are not in the release's chunks" if lost else None,
    )


def answered(row: Mapping[str, Any]) -> bool:
    """True when the request got its answer, whole."""
    return not row.get("error") and 200 <= int(row.get("status") or 0) < 300


def _ids(row: Mapping[str, Any]) -> list[str]:
    """A column's list: Parquet gives numpy arrays or None."""
    value = row.get("chunk_ids")
    return [] if value is None else [str(item) for item in value]
