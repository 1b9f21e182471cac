"""A BERT sentence encoder (all-MiniLM-L6-v2) in plain torch: token ids in, unit vectors out.

Why not transformers: importing it costs 7.2 CPU seconds here, torch alone 2.1, and every stage,
every test and the gateway pay it. The forward pass is 40 lines, and tests hold it to
sentence-transformers (cosine >= 0.9999). It also keeps the bits under control: a row's result does
not depend on the batch that it came in (see ``resources.embedding``).

Why not another runtime: on the same rows, one AMX core, texts a CPU second (least cosine to
sentence-transformers): OpenVINO bfloat16 228 (.99996), this in bfloat16 173 (.99997), OpenVINO
float32 68 (1), this in float32 62 (1), ONNX Runtime float32 48 (1), its dynamic int8 108 (.893,
unusable). A third more is not worth a second set of kernels whose bits have to be watched
(``benchmarks/embedding_backends.py``).

torch is imported when an encoder is made, never before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

#: Rows are padded to a multiple of this many tokens: under 10 % waste at 90 tokens a row.
BUCKET = 16

#: On a CPU with AMX, oneDNN multiplies bfloat16 matrices of under 384 rows (tokens of a batch)
#: with another kernel, and other bits come out; measured with torch 2.13 over widths 16 to 256.
#: Smaller batches are filled up, so that a text's bits depend on the text alone.
AMX_ROWS = 512


class BertEncoder:
    """Mean-pooled, L2-normalised BERT.

    Args:
        folder: ``config.json``, ``model.safetensors`` and ``modules.json`` as sentence-transformers
            writes them.
        dtype: "float32", or "bfloat16" for the matrix products (norms, residuals and the pooled
            vector stay float32: what torch's CPU autocast does, 2.8 times as fast). "float16" is
            for a GPU; a CPU multiplies in float32 instead.
        device: "cpu" or "cuda".
        fill: rows that every batch is filled up to, for a GPU, whose kernels follow the shape.

    Raises ConfigError when the device is not there.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu", fill: int = 0) -> None:
        import torch
        from safetensors.torch import load_file

        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"torch {torch.__version__} finds no CUDA device here.",
                where="params.yaml: vectors.device",
                next="set vectors.device: cpu, or run the stage vectors on a GPU machine",
            )
        self._config = read_config(folder)
        self._device, self._fill = device, fill
        low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
        self._low = torch.float32 if low is torch.float16 and device == "cpu" else low
        self._weights: dict[str, Any] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            matrix = "LayerNorm" not in name and not name.startswith("embeddings")
            tensor = tensor.to(self._low) if matrix else tensor.float()
            self._weights[name] = tensor.to(device)
        amx = self._low is torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        self._least_tokens = AMX_ROWS if amx and device == "cpu" else 0
        self.dimension: int = self._config["hidden_size"]

    def encode(self, rows: Sequence[Sequence[int]], alone: bool = False) -> np.ndarray:
        """Vectors of token rows (special tokens included): float32, (rows, dimension), length 1.

        Args:
            alone: compute as is, unfilled. For a question, which comes alone and cannot wait
                (4 ms against 20 with AMX); its bits then differ from the filled ones by about 1e-3.
        """
        import torch

        torch.set_num_threads(1)
        width = padded_width(max(map(len, rows)))
        least = 0 if alone else max(self._fill, -(-self._least_tokens // width))
        count = max(len(rows), least)
        ids = torch.zeros(count, width, dtype=torch.long)
        mask = torch.zeros(count, width, dtype=torch.bool)
        mask[len(rows) :, 0] = True  # a row of no tokens would be 0 / 0
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = True
        with torch.inference_mode():
            ids, mask = ids.to(self._device), mask.to(self._device)
            states = self._forward(ids, mask)
            weight = mask[..., None].float()
            pooled = (states * weight).sum(1) / weight.sum(1)
            vectors: np.ndarray = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return vectors[: len(rows)]

    def _forward(self, ids: Any, mask: Any) -> Any:
        """Token states, float32, (rows, width, dimension)."""
        from torch.nn import functional as F

        batch, width = ids.shape
        heads, hidden = self._config["num_attention_heads"], self.dimension
        table = self._weights
        x = table["embeddings.word_embeddings.weight"][ids]
        x = x + table["embeddings.position_embeddings.weight"][:width]
        x = x + table["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        attend = mask[:, None, None, :]
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}"
            low = x.to(self._low)
            q, k, v = (
                self._linear(low, f"{prefix}.attention.self.{part}")
                .view(batch, width, heads, -1)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
            seen = seen.transpose(1, 2).reshape(batch, width, hidden)
            seen = self._linear(seen, f"{prefix}.attention.output.dense").float()
            x = self._norm(x + seen, f"{prefix}.attention.output.LayerNorm")
            inner = F.gelu(self._linear(x.to(self._low), f"{prefix}.intermediate.dense"))
            inner = self._linear(inner, f"{prefix}.output.dense").float()
            x = self._norm(x + inner, f"{prefix}.output.LayerNorm")
        return x

    def _linear(self, x: Any, name: str) -> Any:
        from torch.nn.functional import linear

        return linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Any, name: str) -> Any:
        from torch.nn.functional import layer_norm

        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return layer_norm(x, (self.dimension,), weight, bias, self._config["layer_norm_eps"])


def padded_width(tokens: int) -> int:
    """The width that a row of so many tokens is computed at."""
    return -(-tokens // BUCKET) * BUCKET


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model that :class:`BertEncoder` can run; else ConfigError."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    kinds = [item["type"].rpartition(".")[2] for item in modules]
    wrong = []
    architecture = f"{config.get('model_type')} / {config.get('hidden_act')}"
    if architecture != "bert / gelu":
        wrong.append(f"architecture {architecture}, not bert / gelu")
    mean = pooling.get("pooling_mode_mean_tokens")
    if kinds != ["Transformer", "Pooling", "Normalize"] or not mean:
        wrong.append(f"modules {kinds}, not mean pooling and normalisation")
    if wrong:
        raise ConfigError(
            "This embedding model cannot be run.",
            offenders=wrong,
            where=str(folder),
            next="set vectors.model to a BERT sentence encoder such as all-MiniLM-L6-v2",
        )
    return config
