"""Typed records that cross a door: between stages, into the release, over the gateway.

Rows travel as Parquet or JSON; these types say which columns exist and what they mean. They are
closed: an unknown field is an error, so that a renamed column is found at the door.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: The one sentence that means "the documents do not answer this".
REFUSAL = "The documents do not say."


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Heading(Record):
    """One heading of a document."""

    level: int  # 1 is the highest
    title: str
    start: int  # character offset of its line in the document's text


class Document(Record):
    """One document of one source, as accepted text."""

    doc_id: str  # "<source>:<path>"
    source: str  # the foreach key: docs, dagster
    path: str  # inside the source: "gates.md", "dagster.AssetSpec"
    title: str
    md5: str  # of the source bytes
    text: str  # byte-exact text, UTF-8
    git_path: str | None = None  # path in this repository, where it has one: "docs/gates.md"
    # How ``text`` is structured. Text formats keep their bytes; html, pdf and docx are extracted.
    format: Literal["markdown", "rst", "text", "code", "docstring"] = "text"
    language: str = ""  # of prose: ISO 639-1 ("en"); of code: Pygments' alias ("python")
    licence: str | None = None  # SPDX, as the source declares it
    headings: list[Heading] = []  # in order; the tree follows from the levels


class Chunk(Record):
    """A span of one document: ``text == document.text[start:end]``."""

    chunk_id: str  # "<doc_id>#<start>-<end>"
    doc_id: str
    source: str
    path: str
    title: str
    heading: str  # heading path, " > "-joined; "" at the top
    start: int  # character offsets into document.text
    end: int
    tokens: int  # under the embedding model's tokenizer, specials excluded
    text_sha: str  # sha256 of text
    text: str
    format: str = "text"  # as the document's, like language and licence: searches filter by them
    language: str = ""
    licence: str | None = None


class Filter(Record):
    """Which chunks a search may return; an empty list does not restrict."""

    sources: list[str] = []
    paths: list[str] = []  # exact
    formats: list[str] = []
    languages: list[str] = []
    licences: list[str] = []
    without_documents: list[str] = []  # doc_ids that must not appear: tombstones


class Passage(Record):
    """What a prompt shows of a chunk. ``n`` counts from 1 in the order shown."""

    n: int
    chunk_id: str
    path: str
    title: str
    heading: str
    text: str  # whitespace-collapsed chunk text
    score: float  # cosine similarity to the question


class Question(Record):
    """A golden question, written by hand. Unanswerable ones have no source."""

    id: str
    question: str
    document: str | None  # path in the repository, "docs/gates.md"
    section: str | None  # the exact heading
    answer: str | None  # a sentence of that section, whitespace-collapsed
    split: Literal["dev", "test"]
    answerable: bool


class Example(Record):
    """A training or evaluation example: a question, its passages, the answer to give."""

    id: str
    split: Literal["train", "dev", "test", "reserve"]
    question: str
    document: str | None
    section: str | None
    answer: str | None  # None: the right answer is the refusal
    passages: list[Passage] | None  # None: to be retrieved when it is answered
    answerable: bool


class SafetyPrompt(Record):
    """A prompt that a release must withstand. See the head of data/safety.yaml."""

    id: str
    suite: Literal["injection", "leakage", "refusal"]
    prompt: str = Field(min_length=1)
    passages: list[str] = []  # planted in place of what the index would give
    forbidden: list[str] = []  # none of these words may stand in the answer, in this order


class Citation(Record):
    """``[n]`` in an answer, resolved to the chunk that it names."""

    n: int
    chunk_id: str
    doc_id: str
    path: str
    heading: str
    start: int
    end: int
    text: str


class Score(Record):
    """One metric of one answer. ``value`` None is INVALID: never a pass, never averaged over."""

    question_id: str
    system: Literal["candidate", "base", "live", "anchor"]
    metric: str
    value: float | None
    reason: str | None = None


Word = Literal["PASS", "FAIL", "UNDECIDED", "INVALID"]


class Check(Record):
    """One question that the gate asked, and what it found. Of what was measured on a machine only
    the outcome stands here; value and interval are in ``measured.json``."""

    family: str  # quality, safety, fairness, latency, resources
    name: str
    outcome: Word
    detail: str  # one sentence: value, bound, n
    change: str = ""  # what would change the outcome
    kind: str = ""  # quality: floor, paired
    against: str | None = None  # base, live, anchor
    value: float | None = None
    bound: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    evidence: dict[str, Any] = {}  # method, documents, level, power ...


class Verdict(Record):
    """What the gate said and why."""

    verdict: Word
    reasons: list[str]  # the checks that decided, then notes
    policy: dict[str, Any]  # as it stood
    policy_sha256: str  # recorded by the scorecard before it scored
    families: dict[str, Word]
    checks: list[Check]
    looks: list[dict[str, Any]]  # questions, level, what each look said
    scorecard: str  # digest of the scorecard folder that was judged
    baseline: str | None  # digest of the live release's scorecard compared with
    anchor: str | None  # digest of the anchor's scorecard compared with


class Member(Record):
    """One input of a release, by digest."""

    path: str
    md5: str  # as dvc.lock holds it (".dir" for folders), or of the file's bytes
    size: int


class Release(Record):
    """Everything that answers a question, by digest. ``id`` is the hash of all the rest."""

    id: str
    members: dict[str, Member]  # documents, chunks, index, base_model, adapter, prompts, …
    prompt: dict[str, str]  # name, version, sha256
    model: dict[str, Any]  # name, architecture, base and adapter digests
    gate: dict[str, Any]  # verdict, policy digest, headline numbers
    eval_set: str  # digest of the golden questions
    params: dict[str, Any]  # the parameter blocks that shaped it
    git_commit: str

    @staticmethod
    def compute_id(body: dict[str, Any]) -> str:
        """SHA-256 of the canonical JSON of everything but ``id``: first 16 hex digits."""
        rest = {key: value for key, value in body.items() if key != "id"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


#: How a second release gets onto a channel; the first one, ``direct``, needs no second release.
Strategy = Literal["blue_green", "canary", "shadow", "ab"]


class Candidate(Record):
    """The release that a channel tries beside its own, and how much of the traffic it has."""

    release: str
    engine_url: str  # as the channel's
    model: str
    strategy: Strategy
    share: float = Field(ge=0, le=1)  # of the sessions; of shadow: of the requests that are copied
    rollout: str  # its id: the ledger's rows and the request log's name it


class Channel(Record):
    """A pointer: which installed release a channel serves, and where its engine answers. The whole
    split of its traffic stands in this one file."""

    name: str
    release: str
    engine_url: str  # http://host:port, the OpenAI-compatible root without /v1
    model: str  # the engine's served model name
    previous: str | None = None
    candidate: Candidate | None = None  # while a rollout is under way


class RequestRecord(Record):
    """One answered (or failed) request, as the request log keeps it."""

    response_id: str
    time: str  # RFC 3339, UTC
    channel: str
    release: str
    model: str
    prompt_version: str
    question: str
    answer: str
    refused: bool
    stream: bool
    status: int
    error: str | None
    chunk_ids: list[str]
    cited: list[int]
    scores: list[float]
    prompt_tokens: int | None
    completion_tokens: int | None
    ttft_ms: float | None
    latency_ms: float
    retrieval_ms: float | None
    # From here on with defaults: records written before these columns existed stay readable.
    kind: str = "chat"  # chat, completions, embeddings
    asked_model: str = ""  # the logical model that the client named
    tenant: str = ""
    key_id: str = ""
    feature: str = ""  # what the cost is attributed to
    session: str = ""  # a keyed hash: the client's own name for it may be a person's
    provider: str = ""
    tier: str = ""
    cost: float = 0.0  # in the currency of the price table
    cached: str = ""  # exact, semantic; "" when a model was asked
    tokens_estimated: bool = False  # the upstream gave no count
    attempts: int = 0  # at upstreams
    guard: str = ""  # the strictest thing that a guard did: allow, flag, redact, block
    prompt_experiment: str = ""  # <prompt>@<digest of versions and weights>, of answers from it
    rollout: str = ""  # the id of the rollout that was under way; "" without one
    arm: Literal["", "stable", "candidate", "shadow"] = ""  # of that rollout


class FeedbackRecord(Record):
    """What somebody thought of one response. The last one of a key counts; all are kept."""

    response_id: str
    tenant: str
    key_id: str
    time: str  # RFC 3339, UTC; when it was received
    thumb: Literal["up", "down"] | None
    edit: str  # the answer as it should have been, masked; "" without one
    comment: str  # masked


class StageExecution(Record):
    """One execution of a stage's process, spooled for MLflow."""

    stage: str
    partition: str | None
    execution: str  # key of the pipeline execution it belongs to
    process: str | None  # "<pid>-<start ticks>" of the dvc process above; its end means: locked
    driver: Literal["dvc", "dagster"]
    dagster_run_id: str | None
    started: str
    seconds: float
    status: Literal["FINISHED", "FAILED"]
    params: dict[str, Any]
    metrics: dict[str, float]
    paths: dict[str, str]
    git_commit: str | None
    lock_md5: str | None
    device: str
    peak_rss_mb: float
    error: str | None = None


class Usage(Record):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatMessage(BaseModel):
    """An OpenAI chat message as a client may send it; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(max_length=100_000)
