"""Stage ``bundle``: what "engine build" means today.

In: base model, adapter. The gate reads the plan and the profile of this bundle, so it comes after;
what it refuses is bundled and goes no further. Out: a folder with
``checkpoint/`` (adapter merged, safetensors, tokenizer, chat template), ``memory.json`` (the
memory plan) and, last, ``launch.json``: the engine's whole configuration but host and port, checked
against the installed vLLM's own command line without importing it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contracts.digests import dir_md5
from contracts.errors import InputError
from contracts.params import Bundle, Params
from stages import harness, memory_plan, vllm_schema


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``; returns sizes and what the KV cache holds."""
    args = launch_args(params.bundle)
    vllm_schema.validate(args)  # half a second, before anything slow
    out = harness.fresh_dir(paths.out)
    checkpoint = out / "checkpoint"
    merge(paths.base_model, paths.adapter, checkpoint, params.bundle.dtype)
    plan = plan_memory(checkpoint, params.bundle)
    harness.write_json(out / "memory.json", plan)
    harness.write_json(out / "launch.json", launch(checkpoint, args))
    exact = plan["exact"]
    harness.progress(
        f"bundle: weights {exact['weights_bytes'] / memory_plan.MIB:.1f} MiB, "
        f"cache for {exact['kv_tokens']:,} tokens, "
        f"{exact['concurrency_at_max_model_len']:g} sequences of full length"
    )
    return {
        "weights_bytes": float(exact["weights_bytes"]),
        "kv_tokens": float(exact["kv_tokens"]),
        "concurrency": float(exact["concurrency_at_max_model_len"]),
        "headroom_bytes": float(plan["headroom_bytes"]),
    }


def launch_args(block: Bundle) -> dict[str, Any]:
    """vLLM's options by flag name, from ``params.bundle``."""
    return {
        "dtype": block.dtype,
        "max-model-len": block.max_model_len,
        "max-num-seqs": block.max_num_seqs,
        # Unset, a CPU engine takes 92 % of the memory.
        "kv-cache-memory-bytes": block.kv_cache_memory_bytes,
        "block-size": block.block_size,
        "enable-prefix-caching": True,
        # Compiling costs 37 s at the first start and gained nothing at this scale.
        "enforce-eager": True,
        # Without this a weak model fills the token limit of a JSON answer with whitespace.
        "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": 0,
    }


def launch(checkpoint: Path, args: dict[str, Any]) -> dict[str, Any]:
    """The launch configuration. The served name comes from the weights: equal weights, one name."""
    return {
        "engine": "vllm",
        "model": checkpoint.name,
        "served_model_name": f"ratchet-{dir_md5(checkpoint)[:12]}",
        "args": args,
        "env": {},
    }


def merge(base: Path, adapter: Path, out: Path, dtype: str) -> None:
    """Add the adapter to the base's weights in float32, then store them as ``dtype``.

    Raises:
        InputError: a folder is incomplete, or the adapter changes nothing.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    for folder, file in ((base, "config.json"), (adapter, "adapter_config.json")):
        if not (folder / file).is_file():
            raise InputError(f"{file} is missing.", where=str(folder), next="dvc repro adapter")
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    after = merged.state_dict()
    if before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    ):
        raise InputError(
            "Merging the adapter changed no weight.",
            where=str(adapter),
            next="dvc repro --force adapter",
        )
    merged.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not tokenizer.chat_template:
        raise InputError("The base model's tokenizer has no chat template.", where=str(base))
    tokenizer.save_pretrained(out)
    for written in out.iterdir():  # safetensors are written for their owner alone
        written.chmod(0o644)


def plan_memory(checkpoint: Path, block: Bundle) -> dict[str, Any]:
    """The memory plan of this checkpoint. Raises ConfigError where it does not fit."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return memory_plan.cpu_plan(
        memory_plan.architecture(config),
        weights=memory_plan.weights_bytes(checkpoint),
        dtype=block.dtype,
        kv_cache_bytes=block.kv_cache_memory_bytes,
        block=block.block_size,
        max_model_len=block.max_model_len,
        max_num_seqs=block.max_num_seqs,
        budget=block.memory_budget_bytes,
    )


if __name__ == "__main__":
    harness.main("bundle", run, paths=("base_model", "adapter", "out"))
