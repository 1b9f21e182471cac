"""stages.bundle: merged weights, a checked launch configuration, a plan that fits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.digests import path_md5
from contracts.errors import ConfigError, InputError
from contracts.params import Params
from serving.engines.launch import read_launch
from stages import bundle
from tests.stages.evaluation_models import params, save_adapter, save_base


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    save_adapter(folder / "base", folder / "idle", scale=0.0)
    return folder


def small(**changes: Any) -> Params:
    """Parameters that fit the tiny model's 256 positions."""
    values = params().model_dump()
    values["bundle"] |= {"max_model_len": 256} | changes
    return Params.model_validate(values)


def run(
    tmp_path: Path, models: Path, out: str = "bundle", adapter: str = "adapter", **changes: Any
) -> Path:
    paths = SimpleNamespace(
        base_model=models / "base",
        adapter=models / adapter,
        out=tmp_path / out,
    )
    metrics = bundle.run(paths, small(**changes))
    assert metrics["weights_bytes"] > 0
    return tmp_path / out


def test_a_bundle_holds_the_merged_model_and_can_be_launched(tmp_path: Path, models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.answers import Systems

    folder = run(tmp_path, models)
    launch = read_launch(folder)  # the engine's own reader
    assert launch.name.startswith("ratchet-") and launch.args["max-model-len"] == 256
    merged = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype="auto")
    assert merged.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer.chat_template
    chat = [{"role": "user", "content": "Which gate?"}]
    systems = Systems(models / "base", models / "adapter")
    ids = torch.tensor([systems.encode(chat)])
    with torch.inference_mode():
        want = systems.model(ids).logits[0, -1]
        got = merged.float()(ids).logits[0, -1]
        with systems.model.disable_adapter():
            base = systems.model(ids).logits[0, -1]
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.999
    assert torch.nn.functional.cosine_similarity(base, want, dim=0) < 0.99
    plan = json.loads((folder / "memory.json").read_text())
    stored = sum(tensor.numel() * 2 for tensor in merged.state_dict().values())
    assert plan["exact"]["weights_bytes"] == stored
    assert plan["exact"]["kv_bytes_per_token"] == 2 * 1 * (32 + 32) * 2


def test_two_builds_are_equal_and_tied_to_no_place(tmp_path: Path, models: Path) -> None:
    first, second = run(tmp_path, models, "a"), run(tmp_path, models, "b")
    assert path_md5(first) == path_md5(second)
    for file in first.rglob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(models) not in file.read_text(), file


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path, models: Path) -> None:
    with pytest.raises(InputError, match="changed no weight"):
        run(tmp_path, models, adapter="idle")


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, models: Path) -> None:
    with pytest.raises(ConfigError) as error:
        run(tmp_path, models, max_model_len=1024, memory_budget_bytes=1 << 28)
    assert len(error.value.offenders) == 2
    assert not (tmp_path / "bundle" / "launch.json").exists()  # the marker of a finished bundle
