"""stages.memory_plan against published figures, and against what does not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError, InputError
from stages import memory_plan
from stages.memory_plan import GIB, architecture


def config(
    layers: int, heads: int, kv_heads: int, head_dim: int = 128, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "vocab_size": 32000,
        **more,
    }


LLAMA_8B = config(32, 32, 8)
LLAMA_70B = config(80, 64, 8)
DEEPSEEK_V3 = config(61, 128, 128, kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128)


@pytest.mark.parametrize(
    ("name", "model", "kib"),
    [
        ("Llama-3-8B", LLAMA_8B, 128),
        ("Llama-3-70B", LLAMA_70B, 320),
        ("Llama-3.1-405B", config(126, 128, 8), 504),
        ("Qwen2.5-7B", config(28, 28, 4), 56),
        ("Qwen3-8B", config(36, 32, 8), 144),
        ("Mixtral-8x7B", config(32, 32, 8), 128),
        ("DeepSeek-V3", DEEPSEEK_V3, 68.625),
        ("nano", config(4, 8, 8, 32), 4),
        ("nested text_config", {"text_config": LLAMA_8B}, 128),
    ],
)
def test_kv_bytes_per_token(name: str, model: dict[str, Any], kib: float) -> None:
    assert architecture(model).kv_bytes_per_token() == kib * 1024, name


def test_tensor_parallelism_divides_heads_but_never_below_one() -> None:
    arch = architecture(LLAMA_70B)
    assert arch.kv_bytes_per_token(tensor_parallel=4) == 80 * 1024
    assert arch.kv_bytes_per_token(tensor_parallel=16) == arch.kv_bytes_per_token(tensor_parallel=8)
    latent = architecture(DEEPSEEK_V3)
    assert latent.kv_bytes_per_token(tensor_parallel=8) == latent.kv_bytes_per_token()
    assert arch.kv_bytes_per_token("fp8") * 2 == arch.kv_bytes_per_token("bfloat16")


def test_the_70b_trap() -> None:
    """70B in BF16 on two 80 GiB cards at 0.88 leaves about 9 GB, not 42."""
    left = memory_plan.gpu_kv_budget(
        device_bytes=80 * GIB, devices=2, utilisation=0.88, weights=int(70.55e9) * 2
    )
    assert 9.0 < left / GIB < 10.0
    on_decimal_cards = memory_plan.gpu_kv_budget(
        device_bytes=80 * 10**9, devices=2, utilisation=0.88, weights=int(70.55e9) * 2
    )
    assert on_decimal_cards < 0  # does not fit at all


def test_concurrency_as_vllm_logged_it() -> None:
    """vLLM PR 12569: 1,381 blocks of 16 tokens at 2,048 a sequence were logged as 10.79x."""
    arch = architecture(LLAMA_70B)
    cache = 1381 * 16 * arch.kv_bytes_per_token()
    assert round(cache / arch.kv_bytes_of_sequence(2048, block=16), 2) == 10.79


def test_hybrid_layers_keep_no_kv() -> None:
    """A published hybrid: 16 of 64 layers x 4 heads x 256 at one byte are 32 KiB a token."""
    kinds = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(64)]
    arch = architecture(config(64, 24, 4, 256, layer_types=kinds))
    assert arch.kv_bytes_per_token("fp8") == 32 * 1024


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"sliding_window": 128}, [128, 128, 128, 128]),
        ({"sliding_window": 128, "use_sliding_window": False}, [None] * 4),
        ({"sliding_window": 128, "sliding_window_pattern": 2}, [128, None, 128, None]),
        ({"sliding_window": 128, "max_window_layers": 3}, [None, None, None, 128]),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2},
            [128, None, 128, None],
        ),
    ],
)
def test_windows_are_read_as_each_family_writes_them(
    more: dict[str, Any], windows: list[int | None]
) -> None:
    assert [layer.window for layer in architecture(config(4, 8, 8, **more)).layers] == windows


def test_a_window_caps_what_a_long_sequence_holds() -> None:
    full = architecture(config(2, 8, 8))
    mixed = architecture(config(2, 8, 8, sliding_window=128, sliding_window_pattern=2))
    short, long = 64, 4096
    assert mixed.kv_bytes_of_sequence(short) == full.kv_bytes_of_sequence(short)
    per_layer = full.kv_bytes_per_token() // 2
    assert mixed.kv_bytes_of_sequence(long) == per_layer * (long + 128 + 16)


def test_a_config_that_lacks_figures_names_them_all() -> None:
    with pytest.raises(InputError) as error:
        architecture({"hidden_size": 8})
    assert error.value.offenders == ["num_hidden_layers", "num_attention_heads", "vocab_size"]


def save_tensors(path: Path, sizes: list[int]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for index, size in enumerate(sizes):
        entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [position, position + size]}
        header[f"t{index}"], position = entry, position + size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * position)


def test_weights_are_exact_over_shards(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model-00001-of-00002.safetensors", [100, 28])
    save_tensors(tmp_path / "model-00002-of-00002.safetensors", [64])
    assert memory_plan.weights_bytes(tmp_path) == 192


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no safetensors"):
        memory_plan.weights_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nojson")
    with pytest.raises(InputError, match="Not a safetensors file"):
        memory_plan.weights_bytes(tmp_path)


PLAN: dict[str, Any] = {
    "weights": 10_000_000,
    "dtype": "bfloat16",
    "kv_cache_bytes": 256 * memory_plan.MIB,
    "block": 32,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "budget": 8 * GIB,
}


def test_the_nano_plan() -> None:
    """4 KiB a token: 256 MiB hold 64 sequences of 1,024 tokens."""
    plan = memory_plan.cpu_plan(architecture(config(4, 8, 8, 32)), **PLAN)
    assert plan["exact"]["kv_bytes_per_token"] == 4096
    assert plan["exact"]["kv_tokens"] == 65536
    assert plan["exact"]["concurrency_at_max_model_len"] == 64.0
    assert plan["exact"]["sequences_always_served"] == 16
    assert plan["total_bytes"] + plan["headroom_bytes"] == 8 * GIB
    assert plan["headroom_bytes"] > 0


def test_what_does_not_fit_is_refused_with_every_limit() -> None:
    arch = architecture(config(4, 8, 8, 32, max_position_embeddings=512))
    with pytest.raises(ConfigError) as error:
        memory_plan.cpu_plan(arch, **PLAN | {"kv_cache_bytes": memory_plan.MIB, "budget": GIB})
    assert [text.split()[0] for text in error.value.offenders] == [
        "bundle.max_model_len",
        "bundle.kv_cache_memory_bytes",
        "bundle.memory_budget_bytes",
    ]
