"""Have people begun to ask about something else, and does it hurt? A test, a verdict, a report.

In: a day's questions, the golden questions as reference, and the day's online evaluation. Out:
``drift.json`` with a :class:`ShiftTest` (is the content new?) and a :class:`DriftVerdict` (is it
new *and* harmful?), and beside it Evidently's page as ``drift.html``.

The test is the one of several tried that neither always fires nor never does: each question's best
cosine to the reference is compared, by a one-sided Mann-Whitney test, with the best cosines of
held-out reference questions. At 500 questions it raised no false alarm in 100 quiet nights and saw
a 20 % shift in 94 of 100 nights. P-values shrink with traffic, so a floor on the effect size stands
beside them, and new content alone is no reason to retrain: harm must show in the answers too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import InputError
from contracts.params import Monitoring, Params
from stages import harness, tables

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ShiftTest:
    """Outcome of the rank test. ``effect`` is the rank-biserial correlation, positive when current
    questions are farther from the reference than held-out reference questions are."""

    current: int
    reference: int
    held_out: int
    p: float
    effect: float
    median_similarity: float
    median_held_out: float


@dataclass(frozen=True)
class DriftVerdict:
    """``drift``: new content and harm. ``shift``: new content, answers as good as agreed.
    ``stable``: neither. ``no_verdict``: too few requests, or nothing to compare with."""

    verdict: Literal["drift", "shift", "stable", "no_verdict"]
    reasons: list[str]


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out`` from ``paths.requests``, ``paths.online_eval`` and ``paths.golden``."""
    from contracts.settings import Settings
    from resources.embedding import open_embedder

    asked = [
        str(row["question"]) for row in tables.read_table(paths.requests, ["question"]).to_pylist()
    ]
    reference = read_reference(paths.golden)
    online = json.loads(paths.online_eval.read_text(encoding="utf-8"))
    block = params.vectors
    embedder = open_embedder(block, Settings.from_env().embeddings_dir, threads=1, device="cpu")
    test, unlike = None, []
    if len(set(asked)) >= params.monitoring.min_requests:
        now, before = embedder.embed(asked), embedder.embed(reference)
        test = shift_test(now, before)
        similarity = max_similarity(now, before)
        unlike = farthest(asked, similarity)
        evidently_report(
            _rows(reference, among_themselves(before)),
            _rows(asked, similarity),
            paths.out.with_suffix(".html"),
        )
    verdict = decide(test, online, params.monitoring)
    record = as_record(test, verdict) | {"requests": len(asked), "farthest": unlike}
    harness.write_json(paths.out, record)
    harness.progress(f"drift: {verdict.verdict}: {record['reason']}")
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float)}


def read_reference(golden: Path) -> list[str]:
    """The golden questions, as asked. Raises InputError where there are none."""
    import yaml

    try:
        entries = yaml.safe_load(golden.read_text(encoding="utf-8")) or []
        questions = [str(entry["question"]) for entry in entries]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(
            f"The golden questions cannot be read: {error}", where=str(golden)
        ) from None
    if not questions:
        raise InputError("There are no golden questions.", where=str(golden))
    return questions


def max_similarity(queries: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Best cosine of each query to any reference. (n, d) and (m, d) of unit rows give (n,)."""
    best: np.ndarray = (queries @ reference.T).max(axis=1)
    return best


def among_themselves(rows: np.ndarray) -> np.ndarray:
    """Best cosine of each unit row to any *other* row: (m, d) gives (m,)."""
    import numpy as np

    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -1)
    best: np.ndarray = similarity.max(axis=1)
    return best


def _rows(questions: Sequence[str], similarity: np.ndarray) -> list[dict[str, Any]]:
    """Rows for :func:`evidently_report`."""
    return [
        {"question": question, "similarity": float(value)}
        for question, value in zip(questions, similarity, strict=True)
    ]


def shift_test(
    current: np.ndarray, reference: np.ndarray, *, seed: int = 7, held_out: float = 0.3
) -> ShiftTest:
    """Compare ``current`` (n, d) with ``reference`` (m, d), both of any scale.

    A seeded share ``held_out`` of the reference is set aside to learn how similar reference-like
    questions are to the rest. Identical current questions count once: one user who repeats a
    question a hundred times is one observation.

    Raises:
        InputError: widths differ, or there are fewer than 20 reference questions.
    """
    import numpy as np
    from scipy.stats import mannwhitneyu

    if current.ndim != 2 or reference.ndim != 2 or current.shape[1] != reference.shape[1]:
        raise InputError(
            f"Embeddings differ in shape: {current.shape} against {reference.shape}.",
            next="embed both with the release's model; a changed model needs a new reference",
        )
    if len(reference) < 20 or len(current) == 0:
        raise InputError(
            "The shift test needs 20 reference questions and one current question; "
            f"got {len(reference)} and {len(current)}."
        )
    current, reference = _unit(np.unique(current, axis=0)), _unit(reference)
    order = np.random.default_rng(seed).permutation(len(reference))
    cut = max(5, round(len(reference) * held_out))
    kept = reference[order[cut:]]
    got, expected = max_similarity(current, kept), max_similarity(reference[order[:cut]], kept)
    outcome = mannwhitneyu(got, expected, alternative="less", method="asymptotic")
    effect = 1 - 2 * float(outcome.statistic) / (len(got) * len(expected))
    return ShiftTest(
        current=len(current),
        reference=len(kept),
        held_out=cut,
        p=float(outcome.pvalue),
        effect=round(effect, 6),
        median_similarity=round(float(np.median(got)), 6),
        median_held_out=round(float(np.median(expected)), 6),
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def decide(
    test: ShiftTest | None, online: Mapping[str, Any] | None, policy: Monitoring
) -> DriftVerdict:
    """The verdict from the test and the night's online evaluation (``stages.online_eval``).

    ``drift`` needs all three: p under ``drift_p``, effect at or above ``drift_effect``, and harm,
    which is a refusal rate above ``max_refusal``. A missing evaluation is no proof of harm.
    """
    if test is None or test.current < policy.min_requests:
        got = "too few" if test is None else test.current
        return DriftVerdict(
            "no_verdict", [f"{got} distinct questions; a verdict needs {policy.min_requests}"]
        )
    measured = (
        f"p = {test.p:.3g} (limit {policy.drift_p:g}), "
        f"effect {test.effect:.3f} (floor {policy.drift_effect:g})"
    )
    if test.p >= policy.drift_p or test.effect < policy.drift_effect:
        return DriftVerdict(
            "stable", [f"questions are as close to the reference as before: {measured}"]
        )
    reasons = [f"questions are farther from the reference than before: {measured}"]
    refusal = (online or {}).get("refusal_rate")
    if refusal is None:
        return DriftVerdict("shift", [*reasons, "no online evaluation says whether answers suffer"])
    if refusal <= policy.max_refusal:
        return DriftVerdict(
            "shift", [*reasons, f"refusal rate {refusal:.3f} is within {policy.max_refusal:g}"]
        )
    return DriftVerdict(
        "drift", [*reasons, f"refusal rate {refusal:.3f} is above {policy.max_refusal:g}"]
    )


def farthest(
    questions: Sequence[str], similarity: np.ndarray, count: int = 10
) -> list[tuple[str, float]]:
    """The distinct questions least like the reference, for a person to read."""
    pairs = sorted(zip(similarity.tolist(), questions, strict=True))
    seen = {question: round(value, 4) for value, question in reversed(pairs)}
    return sorted(seen.items(), key=lambda item: (item[1], item[0]))[:count]


def as_record(test: ShiftTest | None, verdict: DriftVerdict) -> dict[str, Any]:
    """Both as one flat dict, for a file and for asset metadata; without a test no figures."""
    reason = "; ".join(verdict.reasons)
    figures = asdict(test) if test else {}
    return {"verdict": verdict.verdict, "reason": reason, "reasons": verdict.reasons, **figures}


def evidently_report(
    reference: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Evidently's drift page over plain columns of the questions: a diagnostic, never an alarm.

    Rows need ``question`` (str) and may have ``similarity`` (float). The HTML is self-contained.
    Its own verdicts mislead here (they flag most quiet nights), so they are not read back.
    Importing Evidently costs 10 CPU seconds.
    """
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset, DataSummaryPreset

    def dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
        frame = pd.DataFrame(
            {
                "similarity": [float(row.get("similarity", float("nan"))) for row in rows],
                "characters": [len(str(row["question"])) for row in rows],
                "words": [len(str(row["question"]).split()) for row in rows],
            }
        ).dropna(axis="columns", how="all")
        return Dataset.from_pandas(
            frame, data_definition=DataDefinition(numerical_columns=list(frame.columns))
        )

    if not reference or not current:
        raise InputError("The drift page needs reference and current questions.", where=str(path))
    report = Report([DataDriftPreset(), DataSummaryPreset()])
    snapshot = report.run(dataset(current), dataset(reference))
    path.parent.mkdir(parents=True, exist_ok=True)
    snapshot.save_html(str(path))


if __name__ == "__main__":
    harness.main("drift", run, paths=("requests", "online_eval", "golden", "out"))
