"""The other side of the profile: plain transformers over the same weights and prompts.

In, as JSON on stdin: checkpoint folder, dtype, chats, the tokens to generate for each chat in every
run, batch. Out, as the last line on stdout: timings and peak memory. A process of its own, so that
its peak is its own. Batches are static, in the order given: each runs until its longest answer is
done, which is what ``generate`` does and what continuous batching is compared with.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


def main() -> None:
    """Read the job, run it, print the outcome."""
    job = json.load(sys.stdin)
    print(json.dumps(measure(job)), flush=True)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time every run of ``job["runs"]`` (name → tokens to generate per chat)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # lengths are fixed: nothing may end early
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in job["chats"]
    ]
    batches = range(0, len(texts), job["batch"])
    threads = _best_threads(model, tokenizer, texts[: job["batch"]])
    runs = {}
    for name, lengths in job["runs"].items():
        begun = time.perf_counter()
        parts = [
            _generate(
                model,
                tokenizer,
                texts[start : start + job["batch"]],
                max(lengths[start : start + job["batch"]]),
            )
            for start in batches
        ]
        runs[name] = {
            "seconds": time.perf_counter() - begun,
            "tokens": sum(lengths),
            "ttft": [first for first, _, _ in parts],
            "tpot": [(total - first) / (steps - 1) for first, total, steps in parts if steps > 1],
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"runs": runs, "peak_bytes": peak, "threads": threads}


def _best_threads(model: Any, tokenizer: Any, texts: list[str]) -> int:
    """Set and return the faster of one thread and one per core.

    On a machine that is busy with other work several OpenMP threads wait for each other and one
    alone is many times faster; the peer is to be measured at its best.
    """
    import torch

    trials: list[tuple[float, int]] = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        _generate(model, tokenizer, texts[:1], 2)  # the first call with a thread pool makes it
        trials.append((_generate(model, tokenizer, texts, 8)[1], threads))
    best = min(trials)[1]
    torch.set_num_threads(best)
    return best


def _generate(model: Any, tokenizer: Any, texts: list[str], steps: int) -> tuple[float, float, int]:
    """Generate ``steps`` tokens for a batch: seconds to the first token, in all, and the steps."""
    import torch
    from transformers import LogitsProcessorList

    begun = time.perf_counter()
    first: list[float] = []

    def watch(ids: Any, scores: Any) -> Any:
        """Called with the logits of each step; the first call is the end of the prefill."""
        if not first:
            first.append(time.perf_counter() - begun)
        return scores

    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=steps,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([watch]),
        )
    return first[0], time.perf_counter() - begun, steps


if __name__ == "__main__":
    main()
