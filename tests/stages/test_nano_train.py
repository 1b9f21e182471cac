"""The nano recipe in the small: tokenizer, first weights, packing, training, the folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InputError
from stages.nano import batches, build, corpus, evaluate, init, layout, tokens, train
from tests.stages import nano_models

QUESTION = "What does the gate compare?"


@pytest.fixture(scope="module")
def setup() -> train.Setup:
    """Untrained, from four pages of text."""
    train.seed_everything(7, 1)
    return train.prepare(nano_models.texts(), nano_models.knobs())


def shown(setup: train.Setup, seed: int = 0) -> list[batches.Passage]:
    return setup.train.context(random.Random(seed), 3)[0]


def test_labels_and_citations_are_single_tokens(setup: train.Setup) -> None:
    for text in (*layout.labels(), *tokens.CITATIONS, layout.QUESTION):
        assert len(setup.tokenizer.encode(text, add_special_tokens=False)) == 1, text


def test_a_reader_sees_no_label(setup: train.Setup) -> None:
    tokenizer = setup.tokenizer
    for text in ("Ünïcode \u00a0 and `code_like --this`. [2]", "The gate compares. [1]"):
        ids = tokenizer.encode(f"§2b {text}", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_renders_what_was_trained(setup: train.Setup) -> None:
    user = layout.render_user(QUESTION, shown(setup))
    messages = [
        {"role": "system", "content": layout.SYSTEM},
        {"role": "user", "content": user},
    ]
    text = setup.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = setup.tokenizer.encode(text, add_special_tokens=False)
    assert ids == evaluate.prompt_ids(setup.tokenizer, user)
    packed = batches.pack(
        setup.tokenizer,
        shown(setup),
        [batches.Item(QUESTION, "§1a x")],
        2000,
        [9],
        layout.SYSTEM,
        {},
    )
    assert packed.ids[: len(ids)] == ids


def test_first_weights_copy_the_line_after_its_label(setup: train.Setup) -> None:
    """The induction circuit, before any training: given a label, its line follows."""
    import torch

    right = total = 0
    for seed in range(4):
        passages = shown(setup, seed)
        user = layout.render_user(QUESTION, passages)
        label, line = layout.labelled(1, passages[0].text)[0]
        prompt = evaluate.prompt_ids(setup.tokenizer, user)
        answer = setup.tokenizer.encode(f"{label} {line}", add_special_tokens=False)
        with torch.inference_mode():
            logits = setup.model(torch.tensor([prompt + answer])).logits[0]
        guesses = logits[len(prompt) : -1].clone()
        guesses[:, setup.tokenizer.convert_tokens_to_ids(layout.labels())] = -1e9
        guesses = guesses.argmax(-1).tolist()
        right += sum(a == b for a, b in zip(guesses, answer[1:], strict=True))
        total += len(guesses)
    assert total > 40
    assert right / total > 0.5, "chance is one in nine hundred"


def test_packed_questions_do_not_see_each_other(setup: train.Setup) -> None:
    import torch

    passages = shown(setup)
    items = [batches.Item(QUESTION, "§1a One. [1]"), batches.Item("Who drifts?", "§2a Two. [2]")]

    def logits(chosen: list[batches.Item]) -> Any:
        row = batches.pack(
            setup.tokenizer, passages, chosen, 2000, [9] * len(chosen), layout.SYSTEM, {}
        )
        batch = batches.collate([row], setup.tokenizer.pad_token_id)
        with torch.inference_mode():
            hidden = setup.model.model(
                input_ids=batch["ids"],
                attention_mask=batch["mask"],
                position_ids=batch["position"],
            ).last_hidden_state
        return setup.model.lm_head(hidden.flatten(0, 1)[batch["places"]])

    both, first, second = logits(items), logits(items[:1]), logits(items[1:])
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-3)


def test_labels_may_be_renamed(setup: train.Setup) -> None:
    passages = shown(setup)
    renamed = batches.shifted(passages, random.Random(3))
    user = batches.rename(layout.render_user("", passages), renamed)
    labels = [row[:3] for row in user.split("\n") if row[0] == "§" and row[2].isalpha()]
    assert len(labels) == len(set(labels)) == len(renamed)
    assert sorted(labels) == labels


def run(
    out: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None, **changed: Any
) -> dict[str, float]:
    """The whole recipe over the tiny corpus."""
    texts = nano_models.texts()
    monkeypatch.setattr(corpus, "collect", lambda: texts)
    monkeypatch.setattr(build, "QUESTIONS", 2)
    monkeypatch.setattr(evaluate, "MAX_ANSWER", 4)
    monkeypatch.setattr(train, "CHECKPOINT", 2)
    monkeypatch.setattr(init, "word_vectors", lambda *_: {})  # saves loading MiniLM each time
    if stop_after is not None:
        said: list[str] = []

        def say(message: str) -> None:
            said.append(message)
            if message.startswith(f"nano: step {stop_after}/"):
                raise KeyboardInterrupt

    else:
        say = print  # type: ignore[assignment]
    knobs = nano_models.knobs(corpus_md5=corpus.digest(texts), **changed)
    return build.build(knobs, out, out.parent / "scratch", say)


@pytest.mark.slow
def test_same_bytes_twice_and_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = run(tmp_path / "a" / "model", monkeypatch)
    monkeypatch.setattr(train, "EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b" / "model", monkeypatch, stop_after=3)
    assert not (tmp_path / "b" / "model" / "recipe.json").exists(), "the marker comes last"
    assert list((tmp_path / "b" / "scratch").glob("*.pt")), "the checkpoint of step 2"
    run(tmp_path / "b" / "model", monkeypatch)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / x / "model").iterdir()} for x in "ab")
    assert a == b
    assert not list((tmp_path / "b" / "scratch").glob("*.pt")), "not needed any more"
    recipe = json.loads(a["recipe.json"])
    assert recipe["nano"]["steps"] == 3
    assert metrics["parameters"] == recipe["metrics"]["parameters"] > 1e6
    assert str(tmp_path) not in b"".join(a.values()).decode("latin-1")


def test_a_broken_checkpoint_says_what_to_do(setup: train.Setup, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="delete it"):
        train.fit(setup, nano_models.knobs(), print, path)


def test_word_codes_know_meaning(setup: train.Setup) -> None:
    """Codes of related words are nearer than those of unrelated ones."""
    import torch

    switch, flip, potato = torch.nn.functional.normalize(
        init._embedded(["switch", "flip", "potato"]), dim=1
    )
    assert switch @ flip > switch @ potato + 0.1
    assert init.whole_word("\u0120Gate") == init.whole_word("Gate") == "gate"
    assert init.whole_word("ate") is None
