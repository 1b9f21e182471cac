"""retrieval: how well the index finds what the golden questions need, and which search is best.

In: the index, the golden questions (a file, or a folder of them). Out: a folder with report.json,
report.html, its pictures and questions.parquet (one row a dev question).

The metrics are those of the dev questions under the index's own way of searching (params.yaml:
``index.search``, which its manifest keeps); ``stages.retrieval_metrics`` defines them. Dense,
sparse and fused search are compared on the dev questions, and the choice is checked on the test
questions: ``stages.retrieval_choice``. The test split belongs to the gate, so the report names no
question of it. An index that searches in another way than dev chooses is a warning in the report
and the metric ``agrees_with_choice``, and not an error: params.yaml is changed by people.

Below ``retrieval.min_recall`` at the last of ``retrieval.top_k`` the stage fails, after its report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import InputError, QualityError
from contracts.params import Params, Search
from contracts.records import Chunk, Question
from contracts.settings import Settings
from resources.embedding import open_embedder
from resources.index import VectorIndex, open_index
from resources.vector_cache import CachedEmbedder
from stages import harness
from stages.query_class import CLASSES, query_class
from stages.retrieval_choice import DENSE, METRIC, SPARSE, Choice, arm_name, choose, make_arms
from stages.retrieval_metrics import (
    DEPTH,
    Result,
    Summary,
    has_answer,
    in_document,
    in_section,
    scores,
    summarise,
)
from stages.tables import write_table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SPLITS = ("dev", "test")

#: Results of every arm, by split and arm; the same order of questions in each arm.
Arms = dict[str, dict[str, list[Result]]]


@dataclass(frozen=True)
class Findings:
    """Everything that the report says."""

    content: str  # of the index
    certified: dict[str, float]  # the index's recall against exact search
    top_k: list[int]
    floor: float
    arms: Arms
    choice: Choice

    @property
    def own(self) -> list[Result]:
        """The dev questions, searched as the index is set."""
        return self.arms["dev"][self.choice.own]

    @property
    def headline(self) -> str:
        return f"recall_at_{self.top_k[-1]}"

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """By split and arm."""
        return {
            split: {name: summarise(results, self.top_k) for name, results in arms.items()}
            for split, arms in self.arms.items()
        }

    @cached_property
    def shown(self) -> list[str]:
        """The arms of pictures and class tables: dense, sparse, and one fused: the rival of dense,
        or where that is sparse the best on dev."""
        dev = self.summaries["dev"]
        fused = [name for name in dev if name not in (DENSE, SPARSE)]
        fused.sort(key=lambda name: (name != self.choice.rival, -dev[name].metrics[METRIC]))
        return [DENSE, SPARSE, *fused[:1]]

    @cached_property
    def parts(self) -> dict[str, dict[str, dict[str, dict[str, Summary]]]]:
        """By "source" and "class", split, arm and part; only parts that hold a question."""
        names = list(dict.fromkeys((self.choice.own, *self.shown)))
        return {
            kind: {
                split: {name: self._split_up(kind, arms[name]) for name in names}
                for split, arms in self.arms.items()
            }
            for kind in ("source", "class")
        }

    def _split_up(self, kind: str, results: Sequence[Result]) -> dict[str, Summary]:
        groups: dict[str, list[Result]] = {name: [] for name in CLASSES if kind == "class"}
        for item in sorted(results, key=lambda item: item.source):
            if item.question.answerable:
                name = query_class(item.question.question) if kind == "class" else item.source
                groups.setdefault(name, []).append(item)
        return {name: summarise(items, self.top_k) for name, items in groups.items() if items}

    @property
    def missed(self) -> list[Result]:
        """Dev questions without a chunk of their section among the hits."""
        return [item for item in self.own if item.relevant and item.rank is None]


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    questions = read_questions(paths.golden)
    folders = {key: source.uri for key, source in params.documents.sources.items()}
    embedder = open_embedder(params.vectors, Settings.from_env().embeddings_dir)
    with open_index(paths.index) as index:
        setting = Search.model_validate(index.manifest["search"])
        check_model(index, embedder)
        arms = ask(
            questions,
            embedder.embed_questions([item.question for item in questions]),
            index,
            make_arms(setting, params.retrieval.fused),
            folders,
            max(DEPTH, *params.retrieval.top_k),
        )
        content, certified = index.manifest["content"], index.manifest.get("recall", {})
    if not any(item.question.answerable for item in arms["dev"][DENSE]):
        raise InputError("There is no answerable dev question.", where=str(paths.golden))
    knobs = params.retrieval
    choice = choose(arms["dev"], arms["test"], arm_name(setting))
    found = Findings(content, certified, knobs.top_k, knobs.min_recall, arms, choice)
    metrics = flat_metrics(found)
    write_output(paths.out, found, metrics)
    harness.progress(
        f"{int(metrics['questions'])} dev questions, {choice.own}: "
        + ", ".join(f"{name} {metrics[name]:.3f}" for name in (found.headline, "ndcg_at_10", "mrr"))
    )
    harness.progress(verdict(choice))
    if metrics[found.headline] < knobs.min_recall:
        raise QualityError(
            f"{found.headline} is {metrics[found.headline]:.3f}; {knobs.min_recall} is the floor.",
            offenders=[f"{item.question.id}: {item.question.question}" for item in found.missed],
            where=str(paths.out / "report.html"),
            next="read the missed questions in the report; params.yaml: retrieval.min_recall",
        )
    return metrics


def read_questions(path: Path) -> list[Question]:
    """The golden questions of a file, or of every .yaml file in a folder, in order.

    Raises InputError listing every offender.
    """
    import yaml
    from pydantic import ValidationError

    questions: list[Question] = []
    wrong: list[str] = []
    for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
        try:
            items = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(
                f"The golden questions cannot be read: {error}", where=str(file)
            ) from None
        for number, item in enumerate(items if isinstance(items, list) else [items]):
            try:
                questions.append(Question.model_validate(item))
            except ValidationError as error:
                name = item.get("id", number) if isinstance(item, dict) else number
                wrong += [f"{name}: {part['loc']}: {part['msg']}" for part in error.errors()]
    ids = [question.id for question in questions]
    wrong += sorted({f"{name}: this id stands twice" for name in ids if ids.count(name) > 1})
    if wrong or not questions:
        raise InputError("The golden questions are damaged.", offenders=wrong, where=str(path))
    return questions


def check_model(index: VectorIndex, embedder: CachedEmbedder) -> None:
    """Questions must be embedded by the model that embedded the chunks."""
    model = index.manifest["model"]
    if model["digest"] != embedder.digest:
        raise InputError(
            f"The index was made with {model['name']} ({model['dtype']}, {model['digest'][:12]}), "
            f"the questions would be embedded with {embedder.model} ({embedder.dtype}, "
            f"{embedder.digest[:12]}).",
            where="params.yaml: vectors",
            next="run the stages vectors and index again",
        )


def ask(
    questions: Sequence[Question],
    vectors: np.ndarray,
    index: VectorIndex,
    arms: Mapping[str, Search],
    folders: dict[str, str],
    depth: int,
) -> Arms:
    """Search for every question in every way.

    ``vectors`` are the questions', float32, (len(questions), dimension). Raises InputError when a
    question's section is not indexed.
    """
    wanted = {name for item in questions for name in document_ids(item, folders)}
    relevant = relevant_chunks(questions, list(index.chunks(wanted)), folders)
    found: Arms = {split: {name: [] for name in arms} for split in SPLITS}
    for item, vector in zip(questions, vectors, strict=True):
        right = relevant.get(item.id, [])
        source = right[0].source if right else ""
        for name, search in arms.items():
            hits = index.search(vector, depth, text=item.question, search=search)
            found[item.split][name].append(
                Result(
                    item,
                    hits,
                    [in_section(item, hit.chunk, folders) for hit in hits],
                    [has_answer(item, hit.chunk, folders) for hit in hits],
                    len(right),
                    source,
                )
            )
    return found


def document_ids(item: Question, folders: Mapping[str, str]) -> list[str]:
    """The doc_ids that the question's document may have (see ``in_document``)."""
    if item.document is None:
        return []
    places = {**folders, item.document.split("/")[0]: item.document.split("/")[0]}
    return [
        f"{source}:{item.document.removeprefix(f'{folder}/')}"
        for source, folder in places.items()
        if item.document.startswith(f"{folder}/")
    ]


def relevant_chunks(
    questions: Sequence[Question], chunks: Sequence[Chunk], folders: dict[str, str]
) -> dict[str, list[Chunk]]:
    """Chunks of the right section, by question id. Raises InputError where there are none."""
    documents: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        documents.setdefault(chunk.doc_id, []).append(chunk)
    asked = [item for item in questions if item.answerable]
    held = {
        item.document: own
        for own in documents.values()
        for item in asked
        if in_document(item, own[0], folders)
    }
    relevant = {
        item.id: [one for one in held.get(item.document, []) if in_section(item, one, folders)]
        for item in asked
    }
    lost = [
        f"{item.id}: {item.document} > {item.section}" for item in asked if not relevant[item.id]
    ]
    if lost:
        raise InputError(
            "Golden questions name sections that the index does not hold.",
            offenders=lost,
            where="data/golden",
            next="correct document and section, or look for the document in data/quality",
        )
    return relevant


def flat_metrics(found: Findings) -> dict[str, float]:
    """The metrics file: dev under the index's own search, and how the other arms compare."""
    own, test = (found.summaries[split][found.choice.own] for split in SPLITS)
    flat = {"questions": float(own.questions), **own.metrics}
    flat["test_questions"] = float(test.questions)
    for name in (found.headline, METRIC, "mrr"):
        if name in test.metrics:
            flat[f"test_{name}"] = test.metrics[name]
    for name in found.shown:
        flat[f"{name.split(' ')[0]}_{METRIC}"] = found.summaries["dev"][name].metrics[METRIC]
    return flat | {"agrees_with_choice": float(found.choice.agrees)}


def verdict(choice: Choice) -> str:
    """The choice in a few sentences."""
    rival = f"{choice.rival}, {choice.dev[choice.rival]} nDCG@10 to dense"
    if choice.chosen == DENSE:
        said = f"No search is better than dense on dev beyond doubt (the best is {rival}): dense."
    else:
        said = f"On dev the best search that beats dense beyond doubt is {rival}."
    if choice.test is not None:
        said += f" On test the difference is {choice.test}, which "
        if choice.chosen == DENSE:
            said += "does not speak against" if choice.confirmed else "speaks against"
        else:
            said += "confirms" if choice.confirmed else "does not confirm"
        said += " the choice."
    if not choice.agrees:
        said += (
            f" Warning: the index searches {choice.own}; params.yaml: index.search should say "
            f"{choice.chosen}."
        )
    return said


def write_output(out: Path, found: Findings, metrics: dict[str, float]) -> None:
    """Everything that the stage writes; the JSON report comes last."""
    from stages.retrieval_report import page, pictures

    harness.fresh_dir(out)
    write_table(out / "questions.parquet", _table(found))
    drawn = pictures(found)
    for name, png in drawn.items():
        (out / f"{name}.png").write_bytes(png)
    (out / "report.html").write_text(page(found, drawn, verdict(found.choice)), encoding="utf-8")
    harness.write_json(out / "report.json", report(found, metrics))


def report(found: Findings, metrics: dict[str, float]) -> dict[str, Any]:
    """report.json. ``index`` is the content id of the index that was judged."""
    own = found.summaries["dev"][found.choice.own]
    return {
        "index": found.content,
        "metrics": metrics,
        "intervals": {name: list(pair) if pair else None for name, pair in own.intervals.items()},
        "floor": {found.headline: found.floor},
        "against_exact_search": found.certified,
        "missed": [item.question.id for item in found.missed],
        "choice": found.choice.as_json(),
        "arms": _as_json(found.summaries),
        "by_source": _as_json(found.parts["source"]),
        "by_class": _as_json(found.parts["class"]),
    }


def _as_json(tree: Any) -> Any:
    """Nested summaries as nested JSON."""
    if isinstance(tree, Summary):
        return tree.as_json()
    return {name: _as_json(branch) for name, branch in tree.items()}


def _table(found: Findings) -> pa.Table:
    """One row a dev question: what was asked, what came, how it scored."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for at, result in enumerate(found.own):
        item = result.question
        row: dict[str, Any] = {
            "id": item.id,
            "question": item.question,
            "class": query_class(item.question),
            "source": result.source,
            "document": item.document,
            "section": item.section,
            "answerable": item.answerable,
            "chunk_ids": [hit.chunk.chunk_id for hit in result.hits],
            "scores": [round(hit.score, 6) for hit in result.hits],
            "in_section": result.in_section,
        }
        for name in found.shown:
            row[f"rank_{name.split(' ')[0]}"] = found.arms["dev"][name][at].rank
        if item.answerable:
            row |= scores(result, found.top_k)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


if __name__ == "__main__":
    harness.main("retrieval", run, paths=("index", "golden", "out"))
