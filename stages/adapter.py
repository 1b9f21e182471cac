"""adapter: LoRA on the base model, for this knowledge base's vocabulary and house style.

In: base model, training examples, prompts. Out: a peft folder.

Each example is rendered through the prompt that answers will use, so the adapter learns exactly the
requests it will serve. The target is the line of the prompt that holds the answer, with its source
number; where the model's tokenizer has the line's label as a special token (the built-in nano
model) the target begins with it. Half of the loss is on the first token of the answers: it decides
which line is copied.

Examples that show the same passages are packed behind one copy of their common prompt where the
architecture attends fully; a mask keeps them apart. Seeded, a fixed number of threads and
deterministic algorithms: two runs on one machine give the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError, InputError
from contracts.params import Params
from contracts.records import REFUSAL, Example
from stages import harness
from stages.nano import batches, layout

#: Architectures in which a four-dimensional mask and explicit positions mean what they say.
PACKABLE = {"llama", "qwen2", "qwen3"}
DEV = 100  # dev examples that are watched, at most
MAX_TOKENS = 1024  # of one packed sequence; longer single examples are left out
WARM = 0.1  # share of the steps in which the rate rises


@dataclass(frozen=True)
class Encoded:
    """One example as tokens."""

    id: str
    prompt: list[int]
    answer: list[int]


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out``; returns losses and dev exact match with and without the adapter."""
    from resources import prompts as prompt_files

    knobs = params.adapter
    prompt = prompt_files.read(paths.prompts).get(params.answers.prompt)
    seed_everything(knobs.seed, knobs.threads)
    model, tokenizer = load(paths.base_model)
    train = encode_all(read(paths.examples / "train.jsonl"), prompt, tokenizer)
    dev = encode_all(read(paths.examples / "dev.jsonl"), prompt, tokenizer)[:DEV]
    if not train:
        raise InputError(
            "No training example can be rendered with its answer in sight.",
            where=str(paths.examples / "train.jsonl"),
            next="look at the template: it has to show the passages' text",
        )
    before = exact_match(model, dev)
    model = with_lora(model, knobs)
    loss = fit(model, train, knobs)
    after = exact_match(model, dev)
    harness.progress(f"adapter: dev exact match {before:.3f} -> {after:.3f} on {len(dev)}")
    save(model, paths.out)
    return {
        "train_loss": round(loss, 4),
        "train_examples": float(len(train)),
        "dev_exact_match": round(after, 4),
        "dev_exact_match_base": round(before, 4),
        "dev_questions": float(len(dev)),
    }


def seed_everything(seed: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer. Raises InputError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The base model does not load: {str(error).splitlines()[0]}",
            where=str(folder),
            next="dvc repro base_model",
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(
            "The base model's tokenizer has no chat template.",
            where=str(folder),
            next="choose a model with one in params.yaml: base_model",
        )
    return model, tokenizer


def read(path: Path) -> list[Example]:
    """Examples of one file. Raises InputError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"The examples cannot be read: {error}", where=str(path), next="dvc repro examples"
        ) from None
    return [Example.model_validate_json(line) for line in lines]


def encode_all(rows: Sequence[Example], prompt: Any, tokenizer: Any) -> list[Encoded]:
    """Rows with passages, rendered and tokenised; those without their answer in sight go."""
    found = []
    for row in rows:
        if row.passages is None:
            continue
        messages = prompt.messages(row.question, row.passages)
        target = target_of(messages[-1]["content"], row, tokenizer)
        if target is None:
            continue
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": target}], tokenize=False
        )
        answer = whole.removeprefix(text) if whole.startswith(text) else target
        ids = [tokenizer.encode(part, add_special_tokens=False) for part in (text, answer)]
        if not whole.startswith(text):
            ids[1].append(tokenizer.eos_token_id)
        if len(ids[0]) + len(ids[1]) <= MAX_TOKENS:
            found.append(Encoded(row.id, ids[0], ids[1]))
    return found


def target_of(user: str, row: Example, tokenizer: Any) -> str | None:
    """What the model is to answer, as text that the tokenizer encodes."""
    line = layout.find_target(user, row.answer)
    if line is None:  # a template of another layout
        if row.answer is None:
            return REFUSAL
        wanted = layout.normal(row.answer)
        numbers = [p.n for p in row.passages or [] if wanted in layout.normal(p.text)]
        return f"{row.answer} [{numbers[0]}]" if numbers else None
    label, _, rest = line.partition(" ")
    return line if label in tokenizer.all_special_tokens else rest


def with_lora(model: Any, knobs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=knobs.rank,
        lora_alpha=knobs.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def groups(examples: Sequence[Encoded], packable: bool) -> list[list[Encoded]]:
    """Neighbours that share most of their prompt, as many as fit one sequence."""
    found: list[list[Encoded]] = []
    for example in examples:
        last = found[-1] if found else []
        if packable and last and _shared([*last, example]) > 0.8 * len(example.prompt):
            shared = _shared([*last, example])
            size = shared + sum(len(e.prompt) + len(e.answer) - shared for e in [*last, example])
            if size <= MAX_TOKENS:
                last.append(example)
                continue
        found.append([example])
    return found


def _shared(examples: Sequence[Encoded]) -> int:
    """Length of the common beginning of the prompts."""
    first, length = examples[0].prompt, min(len(example.prompt) for example in examples) - 1
    for example in examples[1:]:
        length = next((i for i in range(length) if first[i] != example.prompt[i]), length)
    return length


def pack(group: Sequence[Encoded]) -> batches.Row:
    """One sequence: the common beginning, then each example's own rest behind it."""
    shared = _shared(group)
    ids = list(group[0].prompt[:shared])
    row = batches.Row(ids, [0] * shared, list(range(shared)), [])
    for number, example in enumerate(group, start=1):
        own = example.prompt[shared:]
        start = len(row.ids) + len(own) - 1
        row.predict += [(start + i, token, i == 0) for i, token in enumerate(example.answer)]
        both = own + example.answer[:-1]
        row.ids += both
        row.segment += [number] * len(both)
        row.position += range(shared, shared + len(both))
    return row


def fit(model: Any, examples: Sequence[Encoded], knobs: Any) -> float:
    """Train the adapter in place; returns the mean loss of the last tenth of the steps."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    opt = torch.optim.AdamW(weights, lr=knobs.learning_rate, weight_decay=0.0)
    packed = groups(examples, model.config.model_type in PACKABLE)
    order = _order(len(packed), knobs)
    model.train()
    losses: list[float] = []
    for step in range(knobs.steps):
        for group in opt.param_groups:
            group["lr"] = _rate(step, knobs)
        rows = [pack(packed[next(order)]) for _ in range(knobs.batch)]
        loss = _loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 10 == 0 or step + 1 == knobs.steps:
            recent = sum(losses[-10:]) / len(losses[-10:])
            harness.progress(f"adapter: step {step + 1}/{knobs.steps}  loss {recent:.3f}")
    tail = losses[-max(1, knobs.steps // 10) :]
    return sum(tail) / len(tail)


def _loss(model: Any, rows: list[batches.Row]) -> Any:
    import torch

    logits, batch = _logits(model, rows)
    each = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    first = batch["first"]
    rest = each[~first].mean() if bool((~first).any()) else each.sum() * 0
    return each[first].mean() + rest


def _logits(model: Any, rows: list[batches.Row]) -> tuple[Any, dict[str, Any]]:
    """Logits at the places to predict, (N, vocab), and the batch."""
    import torch

    batch = batches.collate(rows, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_bfloat16()):
        output = model(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            position_ids=batch["position"],
            use_cache=False,
        )
    return output.logits.flatten(0, 1)[batch["places"]].float(), batch


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself. Without it torch emulates: 8 times *slower* than
    float32 on an AVX2 machine (32 ms against 3.8 for one 512 x 256 x 1024 product), an hour for
    what takes three minutes. Kinds of CPUs give other bytes either way."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _order(count: int, knobs: Any) -> Iterator[int]:
    """Groups in a new seeded order each time round."""
    for turn in range(10**9):
        places = list(range(count))
        random.Random(f"{knobs.seed}/adapter/{turn}").shuffle(places)
        yield from places


def _rate(step: int, knobs: Any) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warm = max(1, round(WARM * knobs.steps))
    if step < warm:
        return float(knobs.learning_rate * (step + 1) / warm)
    part = (step - warm) / max(1, knobs.steps - warm)
    return float(knobs.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part))))


def exact_match(model: Any, examples: Sequence[Encoded]) -> float:
    """Share of examples whose greedy answer is exactly the target.

    Every token of the target is the most likely one after the tokens before it: that is the same
    as decoding greedily, at one pass an example.
    """
    import torch

    model.eval()
    right = []
    for example in examples:
        with torch.inference_mode():
            logits, batch = _logits(model, [pack([example])])
        right.append(bool((logits.argmax(-1) == batch["targets"]).all()))
    return sum(right) / len(right) if right else 0.0


def save(model: Any, out: Path) -> None:
    """Write the peft folder. It names its base neutrally: a path would differ by machine."""
    harness.fresh_dir(out)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "base_model"
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # peft's empty card form


if __name__ == "__main__":
    harness.main("adapter", run, paths=("base_model", "examples", "prompts", "out"))
