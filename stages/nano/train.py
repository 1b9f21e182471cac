"""The training loop of the nano model: by steps, seeded, the same bytes on the same machine.

In: texts, the recipe's knobs. Out: tokenizer, model and what held-out documents say about it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from stages.nano import batches, init, layout, tokens, words
from stages.nano.corpus import Text

HELD_OUT = 40  # one document in so many is never trained on
COPIED = (2, 160, 160)  # tokens trained of an answer: most whole, a third its beginning
SINGLE = 0.75  # share of contexts that show single sentences (answers.sentences), not chunks
WARM, FLAT = 0.02, 0.3  # share of the steps; then the rate falls along a cosine
EVERY, CHECKPOINT = 50, 200  # steps between lines of progress, between checkpoints
BETAS, DECAY = (0.9, 0.98), 0.05


@dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step."""

    tokenizer: Any
    model: Any
    train: batches.Maker
    held: batches.Maker


def seed_everything(seed: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def prepare(texts: list[Text], knobs: Any) -> Setup:
    """Tokenizer, initial model and the two halves of the corpus."""
    from transformers import LlamaConfig

    sections = [f"{section.heading}\n{section.text}" for text in texts for section in text.sections]
    tokenizer = tokens.train(sections, knobs.vocab)
    rarity_of = words.rarity(sections)
    plan = init.Plan.of(knobs.hidden)
    vectors = init.word_vectors(tokenizer, plan.identity.stop)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=knobs.hidden,
        intermediate_size=2 * knobs.hidden * 3 // 4 // 32 * 32,
        num_hidden_layers=knobs.layers,
        num_attention_heads=knobs.heads,
        num_key_value_heads=knobs.heads,
        head_dim=init.HEAD,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": init.ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    akin = init.neighbours(vectors)
    codes = init.token_codes(tokenizer, plan, vectors, rarity_of, knobs.seed)
    model = init.build(tokenizer, config, codes, knobs.seed)
    train = [text for at, text in enumerate(texts) if at % HELD_OUT]
    held = [text for at, text in enumerate(texts) if at % HELD_OUT == 0]
    return Setup(
        tokenizer,
        model,
        batches.Maker(batches.chunk(train), rarity_of, akin),
        batches.Maker(batches.chunk(held), rarity_of, akin),
    )


def batch_at(
    setup: Setup, knobs: Any, step: int, maker: batches.Maker, salt: str = "train"
) -> dict[str, Any]:
    """The batch of one step: a function of seed and step alone, so that a run can resume."""
    rng = random.Random(f"{knobs.seed}/{salt}/{step}")
    early = step < 0.1 * knobs.steps and salt == "train"
    rows = []
    for _ in range(knobs.batch):
        if rng.random() < SINGLE:
            shown, hidden = maker.sentences(rng, rng.choice((2, 3, 4, 5, 5, 5)))
        else:
            count = rng.choice((1, 2)) if early else rng.choice((2, 3, 3, 3, 3, 4))
            shown, hidden = maker.context(rng, count)
        items = maker.items(shown, hidden, rng, 20)
        copied = [rng.choice(COPIED) for _ in items]
        system = layout.SYSTEM if rng.random() < 0.85 else ""
        renamed = batches.shifted(shown, rng) if rng.random() < 0.5 else {}
        row = batches.pack(setup.tokenizer, shown, items, knobs.context, copied, system, renamed)
        if row.predict:
            rows.append(row)
    return batches.collate(rows or [row], setup.tokenizer.pad_token_id)


def losses(model: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(loss over labels, loss over copied tokens, is each label right)."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            position_ids=batch["position"],
            use_cache=False,
        ).last_hidden_state
        picked = hidden.flatten(0, 1)[batch["places"]]
        logits = model.lm_head(picked).float()
    each = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    first = batch["first"]
    right = logits.detach()[first].argmax(-1) == batch["targets"][first]
    rest = each[~first].mean() if bool((~first).any()) else each.sum() * 0
    return each[first].mean(), rest, right


def rate(step: int, steps: int, top: float) -> float:
    """Warm-up, flat, cosine to a twentieth."""
    part = step / max(steps, 1)
    if part < WARM:
        return top * (step + 1) / (WARM * steps + 1)
    if part < FLAT:
        return top
    return top * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (part - FLAT) / (1 - FLAT))))


def optimizer(model: Any, knobs: Any) -> Any:
    import torch

    table = [model.model.embed_tokens.weight]
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and "embed" not in name
    ]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": table, "weight_decay": 0.0},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=knobs.learning_rate, betas=BETAS, eps=1e-8)


def fit(
    setup: Setup,
    knobs: Any,
    say: Callable[[str], None],
    checkpoint: Path | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Train ``setup.model`` in place for ``knobs.steps`` steps.

    Args:
        checkpoint: where a killed run continues from; written every CHECKPOINT steps.
        watch: called with the step after every EVERY steps.
    """
    import torch

    model, opt = setup.model, optimizer(setup.model, knobs)
    model.train()
    first_step = _resume(model, opt, checkpoint, say)
    began, seen = time.monotonic(), Progress()
    for step in range(first_step, knobs.steps):
        for group in opt.param_groups:
            group["lr"] = rate(step, knobs.steps, knobs.learning_rate)
        label, copy, right = losses(model, batch_at(setup, knobs, step, setup.train))
        (label + copy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen.add(float(label.detach()), float(copy.detach()), float(right.float().mean()))
        done = step + 1
        if done % EVERY == 0 or done == knobs.steps:
            spent = time.monotonic() - began
            left = spent * (knobs.steps - done) / (done - first_step)
            say(f"nano: step {done}/{knobs.steps}  {seen.line()}  {spent:.0f} s, {left:.0f} s left")
            seen = Progress()
            if watch:
                watch(done)
        if checkpoint and done % CHECKPOINT == 0 and done < knobs.steps:
            _save(model, opt, done, checkpoint)


@dataclass
class Progress:
    """Means over the steps since the last line of progress."""

    steps: int = 0
    label: float = 0.0
    copy: float = 0.0
    right: float = 0.0

    def add(self, label: float, copy: float, right: float) -> None:
        self.steps += 1
        self.label, self.copy, self.right = self.label + label, self.copy + copy, self.right + right

    def line(self) -> str:
        label, copy, right = (v / self.steps for v in (self.label, self.copy, self.right))
        return f"label loss {label:.3f} (right {right:.3f})  copy loss {copy:.3f}"


def _save(model: Any, opt: Any, step: int, path: Path) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"step": step, "model": model.state_dict(), "opt": opt.state_dict()}, part)
    part.replace(path)


def _resume(model: Any, opt: Any, path: Path | None, say: Callable[[str], None]) -> int:
    """The step to go on from: 0 where there is no readable checkpoint."""
    import pickle

    import torch

    if path is None or not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
    except (OSError, RuntimeError, LookupError, ValueError, EOFError, pickle.PickleError) as error:
        raise InputError(
            "The checkpoint of an interrupted training cannot be read: "
            f"{str(error).splitlines()[0]}",
            where=str(path),
            next="delete it; training then starts over and gives the same model",
        ) from error
    say(f"nano: continuing after step {state['step']}")
    return int(state["step"])
