"""params.yaml as one typed, closed object: one block a stage, every knob named once.

An unknown or misspelt key is refused with its nearest neighbour. ``size`` and ``nfiles`` are
refused wherever they stand: DVC's run cache leaves keys of those names out of its hash and
restores stale output (treeverse/dvc#10296).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contracts.errors import ConfigError

FORBIDDEN = {"size", "nfiles"}


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Block):
    """One source of documents. ``path`` is what DVC watches for it.

    ``uri`` is a folder of the repository ("docs") or "python:<package>", the docstrings of an
    installed package; then ``path`` is the lock file that pins the package's version.
    """

    uri: str
    path: str
    include: list[str] = []  # globs inside the source; none: every format that can be read
    exclude: list[str] = []
    licence: str | None = None  # SPDX identifier, kept with every document
    revision: str | None = None  # of a git source: a commit, or a tag or branch


class Documents(Block):
    sources: dict[str, Source]
    engine: Literal["local", "ray"] = "local"
    max_bytes: int = Field(default=16 << 20, ge=1)  # larger files go to quarantine unread


class Quality(Block):
    """Bounds of the Great Expectations suite. A failing suite blocks."""

    min_documents: int = Field(ge=1)
    min_characters: int = Field(ge=1)
    max_characters: int = Field(ge=1)
    min_unique_text: float = Field(ge=0, le=1)  # share of rows whose text is not a duplicate
    max_quarantined: float = Field(ge=0, le=1)  # share of documents that may go to quarantine


class Chunks(Block):
    max_tokens: int = Field(ge=16, le=254)  # MiniLM cuts at 256, two of them special
    strategy: Literal["structure", "recursive", "fixed", "code"] = "structure"
    engine: Literal["local", "ray"] = "local"


class Vectors(Block):
    model: str
    batch: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16"]
    backend: Literal["torch", "openai"] = "torch"  # openai: EMBEDDINGS_URL, any such server
    device: Literal["cpu", "cuda"] = "cpu"  # of torch
    engine: Literal["local", "ray"] = "local"


class Search(Block):
    """How chunks are found. Chosen on the dev questions, confirmed on test: see the report."""

    mode: Literal["dense", "sparse", "fused"] = "dense"
    rrf_k: int = Field(default=60, ge=1)  # of reciprocal rank fusion; 60 is the paper's
    weights: tuple[float, float] = (1.0, 1.0)  # dense, sparse
    depth: int = Field(default=50, ge=1)  # candidates of each side
    ef: int = Field(default=128, ge=1)  # of HNSW


class Index(Block):
    search: Search = Search()
    hnsw_m: int = Field(ge=4)
    ef_construct: int = Field(ge=8)
    exact_below: int = Field(ge=0)  # up to this many chunks search is exact
    min_recall: float = Field(ge=0, le=1)  # recall@10 against exact search
    probes: int = Field(ge=1)  # vectors used to measure it
    keep: int = Field(default=3, ge=1)  # published versions kept for rollback


class Retrieval(Block):
    top_k: list[int]
    min_recall: float = Field(ge=0, le=1)  # floor of recall@(last of top_k) on golden dev


class Nano(Block):
    """The recipe of the built-in base model; stages/nano explains each knob."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    steps: int
    batch: int
    context: int
    learning_rate: float
    seed: int
    threads: int
    corpus_md5: str


class BaseModelParams(Block):
    kind: Literal["nano", "hub", "local"]
    id: str | None = None  # hub id, for kind: hub
    path: str | None = None  # folder, for kind: local
    nano: Nano


class Examples(Block):
    train: int = Field(ge=1)
    unanswerable: float = Field(ge=0, le=1)
    seed: int


class Adapter(Block):
    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int
    threads: int = Field(ge=1)


class Answers(Block):
    """How an answer is made, offline and behind the gateway alike."""

    prompt: str
    top_k: int = Field(ge=1, le=20)  # chunks to find
    # Show only this many sentences of them, those most like the question; null shows whole chunks.
    sentences: int | None = Field(default=None, ge=1, le=20)
    max_tokens: int = Field(ge=1)
    min_score: float = Field(ge=-1, le=1)  # passages less alike than this are not shown


class Scorecard(Block):
    ragas: list[str]


class Floor(Block):
    metric: str
    min: float


class Gate(Block):
    """The policy. Its digest stands in the release."""

    floors: list[Floor]
    paired: list[str]  # metrics compared question by question with the stable release
    max_invalid: float = Field(ge=0, le=1)
    min_common: float = Field(ge=0, le=1)  # of the stable release's questions, still asked
    margin: float = Field(ge=0)
    resamples: int = Field(ge=100)
    seed: int


class Bundle(Block):
    engine: Literal["vllm"]
    dtype: Literal["bfloat16", "float32"]
    max_model_len: int = Field(ge=64)
    max_num_seqs: int = Field(ge=1)
    kv_cache_memory_bytes: int = Field(ge=1 << 20)
    block_size: int = Field(ge=16)
    memory_budget_bytes: int = Field(ge=1 << 28)


class Profile(Block):
    prompts: int = Field(ge=2)
    concurrency: int = Field(ge=1)
    max_tokens: int = Field(ge=2)


class Monitoring(Block):
    """Nightly evaluation and drift; read by the dated assets, not by DVC stages."""

    min_requests: int = Field(ge=1)  # fewer: no verdict
    drift_p: float = Field(gt=0, lt=1)
    drift_effect: float = Field(ge=0, le=1)  # rank-biserial floor
    max_refusal: float = Field(ge=0, le=1)


class Params(Block):
    documents: Documents
    quality: Quality
    chunks: Chunks
    vectors: Vectors
    index: Index
    retrieval: Retrieval
    base_model: BaseModelParams
    examples: Examples
    adapter: Adapter
    answers: Answers
    scorecard: Scorecard
    gate: Gate
    bundle: Bundle
    profile: Profile
    monitoring: Monitoring


def load_params(path: Path) -> Params:
    """Read and check params.yaml. Raises ConfigError listing every offender."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "params.yaml does not exist.", where=str(path), next="run from the repository root"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"params.yaml is not YAML: {error}", where=str(path)) from None
    return parse_params(data, str(path))


def parse_params(data: Any, where: str = "params.yaml") -> Params:
    """Check already-read YAML. Raises ConfigError listing every offender."""
    offenders = [
        f"{key}: this name is forbidden, because DVC's run cache ignores keys called "
        "'size' and 'nfiles' and would restore stale output (treeverse/dvc#10296); rename it"
        for key in _forbidden(data)
    ]
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        offenders += [_explain(item) for item in error.errors()]
    if offenders:
        raise ConfigError(
            "params.yaml is not what the stages accept.", where=where, offenders=offenders
        )
    return params


def _forbidden(data: Any, prefix: str = "") -> list[str]:
    """Dotted paths of keys that DVC's run cache would not see."""
    found: list[str] = []
    if isinstance(data, dict):
        for key, value in data.items():
            path = f"{prefix}{key}"
            if key in FORBIDDEN:
                found.append(path)
            found += _forbidden(value, f"{path}.")
    elif isinstance(data, list):
        for number, value in enumerate(data):
            found += _forbidden(value, f"{prefix}{number}.")
    return found


def _explain(item: Any) -> str:
    """One pydantic error as one line, with the nearest known key where the key is unknown."""
    path = [str(part) for part in item["loc"]]
    dotted = ".".join(path) or "(top level)"
    if item["type"] != "extra_forbidden":
        return f"{dotted}: {item['msg']}"
    near = difflib.get_close_matches(path[-1], _known_keys(path[:-1]), n=1, cutoff=0.5)
    return f"{dotted}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")


def _known_keys(path: list[str]) -> list[str]:
    """The keys that may stand in the block at ``path``."""
    model: Any = Params
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = fields[part].annotation
        elif (args := getattr(model, "__args__", None)) is not None:  # dict[str, X], list[X]
            model = args[-1]
    return list(getattr(model, "model_fields", {}))
