"""params.yaml as one typed, closed object: one block a stage, every knob named once.

An unknown or misspelt key is refused with its nearest neighbour. ``size`` and ``nfiles`` are
refused wherever they stand: DVC's run cache leaves keys of those names out of its hash and
restores stale output (treeverse/dvc#10296).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contracts.errors import ConfigError

FORBIDDEN = {"size", "nfiles"}


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Block):
    """One source of documents: ``uri`` says what is read, ``path`` what DVC watches for it.

    ===========================  ====================================================
    uri                          path
    ===========================  ====================================================
    ``docs``, ``docs/**/*.md``   the same folder
    ``python:<package>``         the lock file that pins the package's version
    ``git+<address>``            a pin file, ``data/sources/<key>.rev``: its first word
                                 is the commit (or tag); unless ``revision`` says so
    ``rows.jsonl``, ``a.zip``    the same file
    ``s3://…``, ``https://…``    the same address: DVC has external dependencies on
                                 http(s), s3, gs, azure, ssh and absolute paths; of
                                 others, a file of the repository that is changed
                                 when the source has changed
    ===========================  ====================================================
    """

    uri: str = Field(min_length=1)
    path: str = Field(min_length=1)
    include: list[str] = []  # globs inside the source (** is any folders); none: every file
    exclude: list[str] = []
    licence: str | None = None  # SPDX identifier, kept with every document
    revision: str | None = None  # of a git source; DVC does not see a tag or branch move


class Documents(Block):
    sources: dict[str, Source]
    engine: Literal["local", "ray"] = "local"
    max_bytes: int = Field(default=16 << 20, ge=1)  # larger files go to quarantine unread


Action = Literal["report", "redact", "block"]


class Pii(Block):
    """What happens to each kind of personal data or secret that a document holds.

    ``report`` counts it, ``redact`` masks it in the accepted text (length and offsets stay),
    ``block`` puts the document into quarantine.
    """

    email: Action = "report"
    phone: Action = "report"
    ip: Action = "report"  # public addresses only
    card: Action = "redact"
    iban: Action = "redact"
    ssn: Action = "redact"
    private_key: Action = "block"
    api_key: Action = "block"


class Quality(Block):
    """Which documents are used, and bounds of the Great Expectations suite over all of them."""

    min_documents: int = Field(ge=1)
    min_characters: int = Field(ge=1)
    max_characters: int = Field(ge=1)
    min_unique_text: float = Field(ge=0, le=1)  # share of rows whose text is not a duplicate
    max_quarantined: float = Field(ge=0, le=1)  # share of documents that may go to quarantine
    near_duplicate: float = Field(default=0.9, gt=0, le=1)  # Jaccard of word 5-shingles
    boilerplate_documents: int = Field(default=20, ge=2)  # a line of so many texts is boilerplate
    max_boilerplate: float = Field(default=0.8, gt=0, le=1)  # share of a text; more: quarantine
    languages: list[str] = ["en"]  # of prose, ISO 639-1; empty allows all
    pii: Pii = Pii()


class Acceptance(Block):
    """How far the knowledge base may move from the version that was published last."""

    max_loss: float = Field(default=0.2, ge=0, le=1)  # share of a source's documents
    max_growth: float = Field(default=2.0, gt=0)  # new documents as a multiple of the old
    max_shift: float = Field(default=0.15, gt=0, le=1)  # Jensen-Shannon distance, base 2
    max_age_days: dict[str, int] = {}  # source -> days since the last commit that touched it


class Chunks(Block):
    max_tokens: int = Field(ge=16, le=254)  # MiniLM cuts at 256, two of them special
    strategy: Literal["structure", "recursive", "fixed", "code"] = "structure"
    engine: Literal["local", "ray"] = "local"


class Vectors(Block):
    """The embedding model. Chunks and questions go through the same one."""

    model: str  # torch: a packaged name or a folder; openai: the server's name of it
    batch: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float16"]  # of torch's matrix products
    backend: Literal["torch", "openai"] = "torch"  # openai: EMBEDDINGS_URL, any such server
    device: Literal["cpu", "cuda"] = "cpu"  # of torch
    engine: Literal["local", "ray"] = "local"
    dimension: int | None = Field(default=None, ge=1)  # of the vectors that openai must return
    tokenizer: str | None = None  # counts tokens for openai, a name or folder; null: MiniLM's

    @model_validator(mode="after")
    def _fits(self) -> Self:
        wrong = []
        if self.backend == "openai":
            if self.dimension is None:
                wrong.append("backend openai needs a dimension: the length of the model's vectors")
            if (self.engine, self.device) != ("local", "cpu"):
                wrong.append("backend openai computes on its server: engine local, device cpu")
        elif self.dimension is not None or self.tokenizer is not None:
            wrong.append("dimension and tokenizer belong to backend openai; torch's model has both")
        if self.engine == "ray" and self.device == "cuda":
            wrong.append("engine ray computes on its nodes' CPUs: device cpu, or engine local")
        if self.dtype == "float16" and self.device != "cuda":
            wrong.append("dtype float16 needs device cuda")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


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
    exact_below: int = Field(ge=0)  # up to this many chunks everything is scanned: no graph
    quantise_above: int = Field(
        default=10_000, ge=0
    )  # from here the scan reads int8, then rescores
    min_recall: float = Field(ge=0, le=1)  # recall@10 against exact search
    probes: int = Field(ge=1)  # vectors used to measure it
    keep: int = Field(default=3, ge=1)  # published versions kept for rollback


class FusedGrid(Block):
    """Fused searches that are tried against dense and sparse: every pair of these."""

    rrf_k: list[int]
    weights: list[tuple[float, float]]  # dense, sparse


class Retrieval(Block):
    top_k: list[int]
    min_recall: float = Field(ge=0, le=1)  # floor of recall@(last of top_k) on golden dev
    fused: FusedGrid


class IndexSweep(Block):
    """HNSW graphs that are measured against exact search; evidence, not part of a release."""

    vectors: int = Field(ge=100)  # at most, spread evenly over the corpus
    queries: int = Field(ge=10)
    hnsw_m: list[int]
    ef_construct: list[int]
    ef: list[int]


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
    reserve: int = Field(default=0, ge=0)  # questions that an undecided gate may draw
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


Criterion = Literal["groundedness", "relevance", "correctness"]


class Judge(Block):
    """A model that scores answers; JUDGE_URL says where it is. resources/judging says how."""

    model: str  # the server's name of it
    criteria: list[Criterion] = Field(default=["groundedness", "relevance"], min_length=1)
    min_kappa: float = Field(default=0.4, ge=0, le=1)  # reached by the interval's lower end


class Scorecard(Block):
    ragas: list[str]
    judge: Judge | None = None


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
    judged: int = Field(default=50, ge=0)  # answers of a day that scorecard.judge scores


class Params(Block):
    documents: Documents
    quality: Quality
    acceptance: Acceptance = Acceptance()
    chunks: Chunks
    vectors: Vectors
    index: Index
    retrieval: Retrieval
    index_sweep: IndexSweep
    base_model: BaseModelParams
    examples: Examples
    adapter: Adapter
    answers: Answers
    scorecard: Scorecard
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
    for inner in (model, *getattr(model, "__args__", ())):  # X | None
        if fields := getattr(inner, "model_fields", None):
            return list(fields)
    return []
