"""Stage ``answers``: every golden test question, answered by the candidate and by the base model.

In: base model, adapter, index, prompts, ``examples/test.jsonl``, ``data/safety.yaml``. Out:
``data/answers.parquet``, one row for each question and system, and one of the candidate for each
safety prompt. Passages are retrieved and prompts rendered by the code that the gateway runs
(``resources.rag``), so that the gate judges what users will get.

Decoding is greedy in float32 with left-padded batches of fixed membership: two runs on one machine
give the same bytes. bfloat16 would be faster, but then padding changes near-tied tokens and an
answer depends on its neighbours in the batch. Passages with nothing to show are answered by the
refusal, without the model, as the gateway does. A question that cannot be answered keeps its row,
with ``answer`` null and the reason: the gate calls that INVALID.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InputError
from contracts.params import Params
from contracts.records import REFUSAL, Example, Passage, SafetyPrompt
from resources.scorers import deterministic as scoring
from stages import harness, tables
from stages.evidence import SYSTEMS, System, read_examples, read_safety

BATCH = 16
#: One thread: sums have one order, and a busy machine does not collapse it as two threads do.
THREADS = 1


@dataclass(frozen=True)
class Generated:
    """What a model gave for one prompt. ``text`` None: it gave nothing, and ``reason`` says why."""

    text: str | None
    finish_reason: str  # stop | length | no_passages | error
    prompt_tokens: int
    completion_tokens: int
    reason: str | None = None


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out``; returns shares of refusals and cut-off answers per system."""
    examples = read_examples(paths.examples / "test.jsonl")
    safety = read_safety(paths.safety)
    shown, prompts = render(examples, paths.index, paths.prompts, params)
    systems = Systems(paths.base_model, paths.adapter)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {"questions": float(len(examples))}
    for system in SYSTEMS:
        answers = systems.answer(system, prompts, max_tokens=params.answers.max_tokens)
        rows += [
            row(example, system, passages, prompt, answer)
            for example, passages, prompt, answer in zip(
                examples, shown, prompts, answers, strict=True
            )
        ]
        metrics |= shares(system, answers)
    # In batches of their own: another safety prompt must not move an answer to a golden question.
    rows += answer_safety(safety, systems, paths, params)
    write(rows, paths.out)
    tokens = [item["prompt_tokens"] for item in rows if item["prompt_tokens"]]
    return metrics | {"prompt_tokens_max": float(max(tokens, default=0))}


def answer_safety(
    prompts: Sequence[SafetyPrompt], systems: Systems, paths: Any, params: Params
) -> list[dict[str, Any]]:
    """The candidate's rows for the safety prompts, with their suite."""
    asked = [safety_example(item) for item in prompts]
    shown, chats = render(asked, paths.index, paths.prompts, params)
    answers = systems.answer(
        "candidate", chats, max_tokens=params.answers.max_tokens, label="safety"
    )
    return [
        row(example, "candidate", passages, chat, answer) | {"suite": item.suite}
        for item, example, passages, chat, answer in zip(
            prompts, asked, shown, chats, answers, strict=True
        )
    ]


def safety_example(item: SafetyPrompt) -> Example:
    """A safety prompt as the retrieval and the prompt see it. Passages of its own are planted: as
    if the index had been poisoned with them."""
    planted = [
        Passage(n=n, chunk_id=f"planted#{n}-{n}", path="planted.md", title="Notes", heading="Notes",
                text=text, score=1.0)
        for n, text in enumerate(item.passages, start=1)
    ]  # fmt: skip
    return Example(
        id=item.id, split="test", question=item.prompt, document=None, section=None, answer=None,
        passages=planted or None, answerable=False,
    )  # fmt: skip


def render(
    examples: Sequence[Example], index: Path, prompts: Path, params: Params
) -> tuple[list[list[Passage]], list[list[dict[str, str]] | None]]:
    """Passages and chat messages of each example; None for messages where there is no passage."""
    from contracts.settings import Settings
    from resources import prompts as prompt_files
    from resources.embedding import open_embedder
    from resources.index import open_index
    from resources.rag import Rag

    vectors = params.vectors
    cache = Settings.from_env().embeddings_dir
    embedder = open_embedder(vectors, cache, threads=THREADS, device="cpu")
    prompt = prompt_files.read(prompts).get(params.answers.prompt)
    harness.progress(f"answers: retrieving for {len(examples)} questions")
    with contextlib.closing(open_index(index)) as opened:
        rag = Rag(
            opened,
            embedder,
            prompt,
            top_k=params.answers.top_k,
            min_score=params.answers.min_score,
            sentences=params.answers.sentences,
        )
        found = rag.retrieve_many([example.question for example in examples])
    shown = [
        example.passages if example.passages is not None else hits
        for example, hits in zip(examples, found, strict=True)
    ]
    messages = [
        rag.messages(example.question, passages) if passages else None
        for example, passages in zip(examples, shown, strict=True)
    ]
    return shown, messages


class Systems:
    """Base model and adapter in one set of weights: ``base`` answers with the adapter switched off.

    Args:
        base: a Hugging Face folder with tokenizer and chat template.
        adapter: a peft folder; None where ``base`` is all there is, as in a bundle.

    Raises:
        InputError: a folder cannot be loaded, or the tokenizer has no chat template.
    """

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(THREADS)
        torch.use_deterministic_algorithms(True)
        for folder, file in ((base, "config.json"), (adapter, "adapter_config.json")):
            if folder is not None and not (folder / file).is_file():
                raise InputError(f"{file} is missing.", where=str(folder), next="dvc repro adapter")
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if not self.tokenizer.chat_template:
            raise InputError("The base model's tokenizer has no chat template.", where=str(base))
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.tuned = adapter is not None
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.eval()
        self.limit: int | None = getattr(model.config, "max_position_embeddings", None)

    def answer(
        self,
        system: System,
        prompts: Sequence[list[dict[str, str]] | None],
        *,
        max_tokens: int,
        label: str = "",
    ) -> list[Generated]:
        """Greedy answers in the order of ``prompts``; None is answered by the refusal. ``label`` is
        for the lines of progress, where it is not the system's name."""
        done: list[Generated | None] = [
            Generated(REFUSAL, "no_passages", 0, 0) if p is None else None for p in prompts
        ]
        ids = {i: self.encode(prompt) for i, prompt in enumerate(prompts) if prompt is not None}
        for i, tokens in list(ids.items()):
            if self.limit is not None and len(tokens) + max_tokens > self.limit:
                reason = f"{len(tokens)} + {max_tokens} tokens exceed the model's {self.limit}"
                done[i] = Generated(None, "error", len(tokens), 0, reason)
                del ids[i]
        order = sorted(ids, key=lambda i: (len(ids[i]), i))  # like lengths together: little padding
        off = system == "base" and self.tuned
        switch = self.model.disable_adapter() if off else contextlib.nullcontext()
        with switch:
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                for i, answer in zip(
                    batch, self._generate([ids[i] for i in batch], max_tokens), strict=True
                ):
                    done[i] = answer
                done_now = f"{start + len(batch)}/{len(order)}"
                harness.progress(f"answers: {label or system} {done_now}")
        return [answer for answer in done if answer is not None]

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the chat, ready for the assistant's turn."""
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, batch: list[list[int]], max_tokens: int) -> list[Generated]:
        import torch

        width = max(map(len, batch))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(item)) + item for item in batch])
        mask = torch.tensor([[0] * (width - len(item)) + [1] * len(item) for item in batch])
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
        return [
            self._read(item, new)
            for item, new in zip(batch, output[:, width:].tolist(), strict=True)
        ]

    def _read(self, prompt: list[int], new: list[int]) -> Generated:
        """Tokens up to the end mark as an answer."""
        ends = self.model.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        cut = next((i for i, token in enumerate(new) if token in stop), None)
        kept = new if cut is None else new[:cut]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Generated(text, "length" if cut is None else "stop", len(prompt), len(kept))


def row(
    example: Example,
    system: System,
    passages: Sequence[Passage],
    prompt: list[dict[str, str]] | None,
    answer: Generated,
) -> dict[str, Any]:
    """One row of answers.parquet."""
    text = answer.text or ""
    return {
        "question_id": example.id,
        "system": system,
        "question": example.question,
        "document": example.document,
        "answerable": example.answerable,
        "golden": example.answer,
        # Four decimals: another CPU's bfloat16 moves the fifth, and the score decides nothing here.
        "passages": json.dumps(
            [item.model_dump() | {"score": round(item.score, 4)} for item in passages],
            ensure_ascii=False,
            sort_keys=True,
        ),
        "messages": json.dumps(prompt, ensure_ascii=False) if prompt else None,
        "answer": answer.text,
        "refused": scoring.is_refusal(text),
        "cited": scoring.cited(text),
        "chunk_ids": [item.chunk_id for item in passages],
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "error": answer.reason,
        "suite": None,
    }


def shares(system: System, answers: Sequence[Generated]) -> dict[str, float]:
    """Flat metrics of one system's answers."""
    count = len(answers)
    return {
        f"{system}_refused": round(
            sum(scoring.is_refusal(item.text or "") for item in answers) / count, 6
        ),
        f"{system}_cut_off": round(
            sum(item.finish_reason == "length" for item in answers) / count, 6
        ),
        f"{system}_missing": float(sum(item.text is None for item in answers)),
    }


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Rows by question and system, with a fixed schema: an empty list column keeps its type."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    schema = pa.schema(
        [
            ("question_id", text),
            ("system", text),
            ("question", text),
            ("document", text),
            ("answerable", pa.bool_()),
            ("golden", text),
            ("passages", text),
            ("messages", text),
            ("answer", text),
            ("refused", pa.bool_()),
            ("cited", pa.list_(number)),
            ("chunk_ids", pa.list_(text)),
            ("finish_reason", text),
            ("prompt_tokens", number),
            ("completion_tokens", number),
            ("error", text),
            ("suite", text),  # of a safety prompt; null of a golden question
        ]
    )
    tables.write_rows(
        out, sorted(rows, key=lambda item: (item["question_id"], item["system"])), schema
    )


if __name__ == "__main__":
    harness.main(
        "answers",
        run,
        paths=("base_model", "adapter", "index", "prompts", "examples", "safety", "out"),
    )
