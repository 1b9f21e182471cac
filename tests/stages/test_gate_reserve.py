"""Reserve questions: answered by real models, from a bundle and from an installed release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.errors import InputError, NotFoundError
from contracts.params import Params
from contracts.settings import Settings
from resources.releases import Installed
from stages import evidence
from stages.gating.card import Card, Other
from stages.gating.reserve import Reserve
from tests.stages.evaluation_models import example, params, save_adapter, save_base
from tests.stages.test_answers import write_inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base")
    save_base(folder / "live", seed=9)
    save_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def small() -> Params:
    values = params().model_dump()
    values["answers"] |= {"max_tokens": 8, "top_k": 2, "min_score": 0.2}
    values["scorecard"] |= {"ragas": []}
    return Params.model_validate(values)


@pytest.fixture
def reserve(tmp_path: Path, models: Path, small: Params, settings: Settings) -> Reserve:
    paths = write_inputs(tmp_path, models, small)
    shutil.copytree(models / "base", tmp_path / "bundle" / "checkpoint")
    (tmp_path / "judges.json").write_text("{}")
    paths.bundle, paths.judges = tmp_path / "bundle", tmp_path / "judges.json"
    asked = [
        example(7, document="docs:b.md").model_copy(
            update={"question": "Does the cache expire?", "split": "reserve"}
        ),
        example(8, document="docs:c.md").model_copy(
            update={"question": "What does a rollback flip?", "split": "reserve"}
        ),
    ]
    return Reserve(paths, small, asked)


def empty() -> Card:
    return Card(
        {}, {"answer_overlap": {"q1": 0.5}}, {"answer_overlap": {"q1": 0.4}}, frozenset(), None
    )


def test_candidate_and_base_answer_and_every_score_is_kept(
    reserve: Reserve, tmp_path: Path
) -> None:
    card, (base,) = reserve.draw(empty(), [Other("base", empty().base)], 0, 2)
    assert set(card.questions) == {"q007", "q008"}
    assert card.cluster("q007") == "docs:b.md"
    for scores in (card.candidate, card.base, base.scores):
        assert set(scores["answer_overlap"]) == {"q1", "q007", "q008"}
        assert set(scores["exact_match"]) == {"q007", "q008"}
    # The bundle holds the base's weights here, so both said the same.
    assert card.candidate["exact_match"] == base.scores["exact_match"]
    evidence.write_scores(reserve.rows, tmp_path / "reserve.parquet")
    kept = evidence.read_scores(tmp_path / "reserve.parquet")
    assert {row.system for row in kept} == {"candidate", "base"} and len(kept) == len(reserve.rows)


def test_an_installed_release_answers_with_its_own_weights_index_and_knobs(
    reserve: Reserve, models: Path, small: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are those that it was certified with: here it shows nothing, so it refuses."""
    folder = tmp_path / "installed"
    shutil.copytree(models / "live", folder / "bundle" / "checkpoint")
    shutil.copytree(tmp_path / "index", folder / "index")
    shutil.copy(tmp_path / "prompts.json", folder / "prompts.json")
    blocks = {
        name: json.loads(getattr(small, name).model_dump_json()) for name in ("answers", "vectors")
    }
    blocks["answers"]["min_score"] = 0.99
    record: Any = SimpleNamespace(id="f" * 16, params=blocks)
    monkeypatch.setattr(
        "resources.releases.verify", lambda settings, name: Installed(record, folder)
    )
    live = Other("live", {}, "f" * 16, "s")
    _, (grown,) = reserve.draw(empty(), [live], 0, 2)
    assert grown.scores["false_refusal"] == {"q007": 1.0, "q008": 1.0}


def test_a_release_that_is_not_installed_stops_before_anything_is_answered(
    reserve: Reserve,
) -> None:
    with pytest.raises(NotFoundError, match="is not installed here"):
        reserve.draw(empty(), [Other("base", {}), Other("live", {}, "f" * 16, "s")], 0, 2)
    assert reserve.rows == []


def test_the_reserve_is_read_in_its_order_and_checked(tmp_path: Path) -> None:
    one = example(1).model_copy(update={"split": "reserve"})
    (tmp_path / "reserve.jsonl").write_text(one.model_dump_json() + "\n")
    assert [item.split for item in evidence.read_examples(tmp_path / "reserve.jsonl")] == [
        "reserve"
    ]
    with pytest.raises(InputError, match="dvc repro examples"):
        evidence.read_examples(tmp_path / "none.jsonl")
