"""stages.statistics: intervals that know about documents."""

from __future__ import annotations

import numpy as np
import pytest

from stages import statistics


def test_estimate_is_seeded_and_wider_when_questions_share_documents() -> None:
    rng = np.random.default_rng(3)
    luck = rng.normal(size=20).repeat(10)  # every document has its own level
    documents = np.arange(20).repeat(10).tolist()
    clustered = statistics.estimate(luck.tolist(), documents, 500, 7)
    alone = statistics.estimate(luck.tolist(), list(range(200)), 500, 7)
    assert clustered == statistics.estimate(luck.tolist(), documents, 500, 7)
    assert (clustered.unit, clustered.clusters, clustered.n) == ("document", 20, 200)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_few_documents_fall_back_to_questions() -> None:
    found = statistics.estimate([0.0, 1.0] * 10, ["a", "b"] * 10, 500, 7)
    assert found.unit == "question"
    assert found.low < 0.5 < found.high
    with pytest.raises(ValueError, match="no values"):
        statistics.estimate([], [], 10, 7)
