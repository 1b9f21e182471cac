"""Every class of defect, planted into installed packages' prose, is found; look-alikes are not."""

from __future__ import annotations

import pytest

from benchmarks import defects, planted

COUNT = 60


@pytest.mark.parametrize(
    "measure",
    [
        defects.mojibake,
        defects.noise,
        defects.near_duplicates,
        defects.boilerplate,
        defects.language,
        defects.leakage,
    ],
    ids=lambda measure: measure.__name__,
)
def test_a_class_reaches_its_floors(measure: object) -> None:
    assert callable(measure)
    score = measure(COUNT)
    assert score.planted >= COUNT // 4 and score.alike >= COUNT // 4
    assert defects.holds(score), score


@pytest.mark.parametrize("kind", planted.PII)
def test_a_kind_of_personal_data_reaches_its_floors(kind: str) -> None:
    score = defects.personal(kind, COUNT)
    assert (score.planted, score.alike) == (COUNT, COUNT)
    assert defects.holds(score), score
