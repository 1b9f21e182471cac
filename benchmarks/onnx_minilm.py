"""MiniLM in ONNX Runtime and OpenVINO: the other half of benchmarks/embedding_backends.py.

Runs under ``$BENCH_PYTHON``, an environment with onnx, onnxruntime, openvino, numpy and safetensors
(they are no part of this project's lock), so it imports nothing of ours.

    $BENCH_PYTHON benchmarks/onnx_minilm.py <model folder> <batches.json> <out folder>

In: batches of token rows, each batch of one padded width. Out: a ``<backend>.npy`` of unit vectors
a backend, in the order of the rows, and the CPU seconds of each on standard output, as JSON. The
graph is written here, operator by operator, from the weights: the same model as
``resources/encoder.py``, with no exporter between.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file

ROUNDS = 2
#: A backend: token ids, positions and attention bias in, token states out.
Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def main() -> None:
    folder, batches, out = map(Path, sys.argv[1:])
    rows = [pad(batch) for batch in json.loads(batches.read_text())]
    file = out / "minilm.onnx"
    onnx.save(build(folder), file)
    quantize_dynamic(file, out / "int8.onnx", weight_type=QuantType.QInt8)
    backends = {
        "ONNX Runtime float32": onnx_runtime(file),
        "ONNX Runtime dynamic int8": onnx_runtime(out / "int8.onnx"),
        "OpenVINO float32": open_vino(file, "f32"),
        "OpenVINO bfloat16": open_vino(file, "bf16"),
    }
    seconds: dict[str, float] = {}
    for number in range(ROUNDS + 1):  # the first one compiles kernels for each shape
        for name, forward in backends.items():
            started = time.process_time()
            vectors = np.concatenate([embed(forward, *batch) for batch in rows])
            spent = time.process_time() - started
            if number:
                seconds[name] = min(seconds.get(name, 1e9), spent)
            np.save(out / f"{name}.npy", vectors)
    print(json.dumps(seconds))


def pad(batch: dict[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of a batch: (rows, width)."""
    rows, width = batch["rows"], batch["width"]
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.float32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def embed(forward: Forward, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean-pooled unit vectors of a batch."""
    bias = np.where(mask[:, None, None, :] > 0, 0, -1e9).astype(np.float32)
    states = forward(ids, np.arange(ids.shape[1]), bias)
    pooled = np.einsum("btd,bt->bd", states, mask) / mask.sum(1, keepdims=True)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def onnx_runtime(file: Path) -> Forward:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(ids: np.ndarray, positions: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return session.run(None, {"ids": ids, "positions": positions, "bias": bias})[0]

    return forward


def open_vino(file: Path, precision: str) -> Forward:
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(str(file), "CPU", options).create_infer_request()

    def forward(ids: np.ndarray, positions: np.ndarray, bias: np.ndarray) -> np.ndarray:
        request.infer({"ids": ids, "positions": positions, "bias": bias})
        return request.get_output_tensor(0).data.copy()

    return forward


def build(folder: Path) -> onnx.ModelProto:
    """The encoder as an ONNX graph (opset 20), of any batch and width."""
    config = json.loads((folder / "config.json").read_text())
    graph = Graph(load_file(folder / "model.safetensors"), config)
    x = graph.embed()
    for layer in range(config["num_hidden_layers"]):
        x = graph.layer(x, f"encoder.layer.{layer}")
    made = helper.make_graph(
        graph.nodes,
        "minilm",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows", "width"]),
            helper.make_tensor_value_info("positions", TensorProto.INT64, ["width"]),
            helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["rows", 1, 1, "width"]),
        ],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["rows", "width", graph.hidden])],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


class Graph:
    """Nodes and weights, gathered layer by layer; methods return the name of their result."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict[str, object]) -> None:
        self.weights, self.config = weights, config
        self.hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def norm(self, x: str, name: str) -> str:
        scale, shift = (self.constant(self.weights[f"{name}.{end}"]) for end in ("weight", "bias"))
        return self.node(
            "LayerNormalization", x, scale, shift, epsilon=self.config["layer_norm_eps"]
        )

    def linear(self, x: str, name: str) -> str:
        product = self.node("MatMul", x, self.constant(self.weights[f"{name}.weight"].T))
        return self.node("Add", product, self.constant(self.weights[f"{name}.bias"]))

    def embed(self) -> str:
        table = {
            key: self.weights[f"embeddings.{key}_embeddings.weight"]
            for key in ("word", "position", "token_type")
        }
        words = self.node("Gather", self.constant(table["word"]), "ids")
        places = self.constant(table["position"] + table["token_type"][0])
        x = self.node("Add", words, self.node("Gather", places, "positions"))
        return self.norm(x, "embeddings.LayerNorm")

    def layer(self, x: str, prefix: str) -> str:
        split = self.constant(np.array([0, 0, self.heads, self.hidden // self.heads]))
        q, k, v = (
            self.node("Reshape", self.linear(x, f"{prefix}.attention.self.{part}"), split)
            for part in ("query", "key", "value")
        )
        scale = self.constant(np.float32((self.hidden // self.heads) ** -0.5))
        q = self.node("Mul", self.node("Transpose", q, perm=[0, 2, 1, 3]), scale)
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 2, 3, 1]))
        weights = self.node("Softmax", self.node("Add", scores, "bias"), axis=-1)
        seen = self.node("MatMul", weights, self.node("Transpose", v, perm=[0, 2, 1, 3]))
        seen = self.node("Transpose", seen, perm=[0, 2, 1, 3])
        seen = self.node("Reshape", seen, self.constant(np.array([0, 0, self.hidden])))
        seen = self.linear(seen, f"{prefix}.attention.output.dense")
        x = self.norm(self.node("Add", x, seen), f"{prefix}.attention.output.LayerNorm")
        inner = self.node("Gelu", self.linear(x, f"{prefix}.intermediate.dense"))
        inner = self.linear(inner, f"{prefix}.output.dense")
        return self.norm(self.node("Add", x, inner), f"{prefix}.output.LayerNorm")


if __name__ == "__main__":
    main()
