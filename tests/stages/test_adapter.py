"""adapter: two runs give the same bytes, packing changes nothing, any chat model will do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.errors import InputError
from contracts.records import REFUSAL, Example, Passage
from resources import prompts as prompt_files
from stages import adapter, harness
from stages.nano import layout
from tests.stages.evaluation_models import params, save_base
from tests.stages.nano_models import TOPICS

ROOT = Path(__file__).parents[2]


def passages() -> list[Passage]:
    return [
        Passage(n=n, chunk_id=f"docs:{name}#0-9", path=f"{name}.md", title=name, heading="",
                text=text[:70].rpartition(".")[0] + ".", score=0.0)
        for n, (name, text) in enumerate(list(TOPICS.items())[:2], start=1)
    ]  # fmt: skip


def example(name: str, question: str, answer: str | None, split: str = "train") -> Example:
    return Example.model_validate(
        {"id": name, "split": split, "question": question, "document": None, "section": None,
         "answer": answer, "passages": passages(), "answerable": answer is not None}
    )  # fmt: skip


def rows(split: str) -> list[Example]:
    answers = [one.text for one in passages()] + [None]
    return [example(f"{split}-{n}", f"What is {n}?", a, split) for n, a in enumerate(answers)]


@pytest.fixture(scope="module")
def prompt() -> Any:
    return prompt_files.load(ROOT / "prompts").get("answer", "v1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model that knows nothing of our labels."""
    return save_base(tmp_path_factory.mktemp("base") / "model", positions=1024)


@pytest.fixture
def paths(base: Path, tmp_path: Path) -> SimpleNamespace:
    folder = tmp_path / "examples"
    folder.mkdir()
    for split in ("train", "dev"):
        text = "".join(row.model_dump_json() + "\n" for row in rows(split))
        (folder / f"{split}.jsonl").write_text(text)
    prompts = prompt_files.load(ROOT / "prompts")
    harness.write_json(tmp_path / "prompts.json", prompts.to_json())
    return SimpleNamespace(
        base_model=base,
        examples=folder,
        prompts=tmp_path / "prompts.json",
        out=tmp_path / "adapter",
    )


def run(paths: Any, **changed: Any) -> dict[str, float]:
    knobs = params().adapter.model_copy(update={"steps": 3, "batch": 2, "rank": 4, **changed})
    return adapter.run(paths, params().model_copy(update={"adapter": knobs}))


def test_twice_the_same_bytes_and_no_path(paths: Any) -> None:
    metrics = run(paths)
    first = {p.name: p.read_bytes() for p in paths.out.iterdir()}
    assert run(paths) == metrics
    assert first == {p.name: p.read_bytes() for p in paths.out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= first.keys()
    assert str(paths.base_model.parent).encode() not in b"".join(first.values())
    assert metrics["train_examples"] == metrics["dev_questions"] == 3


def test_another_seed_gives_another_adapter(paths: Any) -> None:
    run(paths)
    first = (paths.out / "adapter_model.safetensors").read_bytes()
    run(paths, seed=8)
    assert first != (paths.out / "adapter_model.safetensors").read_bytes()


def test_it_learns(paths: Any) -> None:
    before = run(paths, steps=1)["train_loss"]
    assert run(paths, steps=40, learning_rate=0.02)["train_loss"] < before - 0.5


def test_packing_changes_no_logits(base: Path, prompt: Any) -> None:
    import torch

    model, tokenizer = adapter.load(base)
    encoded = adapter.encode_all(rows("train"), prompt, tokenizer)
    groups = adapter.groups(encoded, packable=True)
    assert [len(group) for group in groups] == [3]
    assert [len(group) for group in adapter.groups(encoded, packable=False)] == [1, 1, 1]
    packed = adapter.pack(groups[0])
    assert len(packed.ids) < 0.6 * sum(len(e.prompt) + len(e.answer) for e in encoded)
    with torch.inference_mode():
        together = adapter._logits(model, [packed])[0]
        alone = torch.cat([adapter._logits(model, [adapter.pack([one])])[0] for one in encoded])
    assert torch.allclose(together, alone, atol=0.05)  # bfloat16 sums in another order


def test_targets(base: Path, prompt: Any) -> None:
    tokenizer = adapter.load(base)[1]
    answered, _, refused = rows("train")
    user = prompt.messages(answered.question, answered.passages)[-1]["content"]
    assert adapter.target_of(user, answered, tokenizer) == f"{answered.answer} [1]"
    assert adapter.target_of(user, refused, tokenizer) == REFUSAL
    ours = SimpleNamespace(all_special_tokens=layout.labels())
    assert adapter.target_of(user, answered, ours) == f"§1a {answered.answer} [1]"
    other = f"Context: {answered.answer} Question: ?"  # a template without lines
    assert adapter.target_of(other, answered, tokenizer) == f"{answered.answer} [1]"
    unseen = example("x", "?", "Not in any passage.")
    assert adapter.target_of(user, unseen, tokenizer) is None


def test_exact_match_is_greedy_decoding(base: Path, prompt: Any) -> None:
    import torch

    model, tokenizer = adapter.load(base)
    one = adapter.encode_all(rows("train"), prompt, tokenizer)[0]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.generate(
            input_ids=torch.tensor([one.prompt]),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, len(one.prompt) :].tolist()
    greedy = adapter.Encoded("x", one.prompt, output)
    assert adapter.exact_match(model, [greedy]) == 1.0
    wrong = adapter.Encoded("y", one.prompt, [*output[:-1], (output[-1] + 1) % 50])
    assert adapter.exact_match(model, [greedy, wrong]) == 0.5


def test_nothing_to_learn_from(paths: Any) -> None:
    (paths.examples / "train.jsonl").write_text("")
    with pytest.raises(InputError, match="No training example"):
        run(paths)


def test_no_base_model(paths: Any, tmp_path: Path) -> None:
    paths.base_model = tmp_path / "gone"
    paths.base_model.mkdir()
    with pytest.raises(InputError, match="dvc repro base_model"):
        run(paths)
