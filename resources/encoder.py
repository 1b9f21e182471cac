"""A BERT sentence encoder (all-MiniLM-L6-v2) in plain torch: token ids in, unit vectors out.

Why not transformers: importing it costs 7.2 CPU seconds here, torch alone 2.1, and every stage,
every test and the gateway pay it. The forward pass is 40 lines, and tests hold it to
sentence-transformers (cosine >= 0.9999). It also keeps the bits under control: a row's result does
not depend on the batch that it came in (see ``resources.embedding``).

The matrix products are oneDNN's, over weights packed once, with the gelu and the residual sum in
them. torch's own ``linear`` takes MKL for float32, which on an AMD Zen 5 core gives 98 GFLOP/s
where oneDNN gives 240: 42 texts a second became 86, with the same vectors to 2e-7.

Why not another runtime: OpenVINO in bfloat16 was 1.3 times as fast as torch in bfloat16 on one AMX
core, its float32 1.1 times as torch's float32 was before the packed products, ONNX Runtime slower,
and its dynamic int8 unusable (cosine .89): not worth a second set of kernels whose bits have to be
watched (``benchmarks/embedding_backends.py``).

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

#: Rows (tokens) that oneDNN lays weights out for; 64 to 4,096 gave the same rate at every batch.
PACKED_FOR = 1024


class BertEncoder:
    """Mean-pooled, L2-normalised BERT.

    Args:
        folder: ``config.json``, ``model.safetensors`` and ``modules.json`` as sentence-transformers
            writes them.
        dtype: "float32", or "bfloat16" for the matrix products (norms, residuals and the pooled
            vector stay float32, as in torch's CPU autocast). "float16" is for a GPU; a CPU
            multiplies in float32 instead.
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
        table = load_file(folder / "model.safetensors")
        self._table = {name: tensor.float().to(device) for name, tensor in table.items()}
        fused = torch.ops.mkldnn._is_mkldnn_bf16_supported  # false where oneDNN would refuse it
        low_is_fast = self._low is torch.float32 or fused()
        self._packed = device == "cpu" and torch.backends.mkldnn.is_available() and low_is_fast
        self._matrices = self._prepare()
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
        import torch
        from torch.nn import functional as F

        batch, width = ids.shape
        heads, hidden = self._config["num_attention_heads"], self.dimension
        table = self._table
        x = table["embeddings.word_embeddings.weight"][ids]
        x = x + table["embeddings.position_embeddings.weight"][:width]
        x = x + table["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm").view(batch * width, hidden)
        attend = torch.zeros(batch, 1, 1, width, dtype=self._low, device=ids.device)
        attend = attend.masked_fill(~mask[:, None, None, :], -torch.inf)
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}"
            qkv = self._linear(x, f"{prefix}.attention.self").view(batch, width, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
            seen = seen.transpose(1, 2).reshape(batch * width, hidden)
            x = self._linear(seen, f"{prefix}.attention.output.dense", plus=x)
            x = self._norm(x, f"{prefix}.attention.output.LayerNorm")
            inner = self._linear(x, f"{prefix}.intermediate.dense", gelu=True)
            x = self._linear(inner, f"{prefix}.output.dense", plus=x)
            x = self._norm(x, f"{prefix}.output.LayerNorm")
        return x.view(batch, width, hidden)

    def _prepare(self) -> dict[str, tuple[Any, Any]]:
        """(weight, bias) of each matrix product; query, key and value are one, which is faster."""
        import torch

        names = {name.removesuffix(".weight") for name in self._table if name.endswith(".weight")}
        matrices = {name: [name] for name in names if name.endswith(".dense")}
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}.attention.self"
            matrices[prefix] = [f"{prefix}.{part}" for part in ("query", "key", "value")]
        made = {}
        for name, parts in matrices.items():
            weight, bias = (
                torch.cat([self._table[f"{part}.{end}"] for part in parts]).to(self._low)
                for end in ("weight", "bias")
            )
            if self._packed:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
            made[name] = weight, bias
            for part in parts:  # not held twice
                del self._table[f"{part}.weight"], self._table[f"{part}.bias"]
        return made

    def _linear(self, x: Any, name: str, gelu: bool = False, plus: Any = None) -> Any:
        """``x @ weight + bias``, then gelu, or ``plus`` added: float32 then, else the low dtype."""
        import torch
        from torch.nn import functional as F

        (weight, bias), x = self._matrices[name], x.to(self._low)
        if not self._packed:
            product = F.linear(x, weight, bias)
            product = F.gelu(product) if gelu else product
            return product if plus is None else product.float() + plus
        product_of = torch.ops.mkldnn._linear_pointwise
        if gelu:
            return product_of(x, weight, bias, "gelu", [], "none")
        if plus is not None and self._low is torch.float32:
            return product_of.binary(x, plus, weight, bias, "add")
        product = product_of(x, weight, bias, "none", [], "")
        return product if plus is None else product.float() + plus

    def _norm(self, x: Any, name: str) -> Any:
        from torch.nn.functional import layer_norm

        weight, bias = self._table[f"{name}.weight"], self._table[f"{name}.bias"]
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
