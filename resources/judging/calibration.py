"""What a judge is worth: measured against people, kept under the judge's version.

In: labels, one JSON object a line, of pairs (``question, first, second, better``) or of single
answers (``question, answer, criterion, score``). Out: :class:`Calibration` records, one a form, and
``data/judges.json``, which keeps the last one of each version. Another prompt, schema, model or
parameter is another version and starts without one: its scores count for nothing until somebody has
measured it. The file is in git, so a commit says which judge was trusted, and why.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.digests import text_sha
from contracts.errors import InputError
from resources.judging import pairwise, rubric
from resources.judging.agreement import Interval, kappa, share, squared
from resources.judging.client import Invalid
from resources.judging.judge import Judge
from resources.judging.pairwise import Pair, Vote
from resources.scorers.scorer import Item

NO_VERDICT = "no verdict"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairLabel(_Closed):
    """Which of two answers people prefer."""

    question: str
    first: str
    second: str
    better: Literal["first", "second", "tie"]
    passages: list[str] = []


class ScoreLabel(_Closed):
    """What people give one answer by one criterion."""

    question: str
    answer: str
    criterion: Literal["groundedness", "relevance", "correctness"]
    score: Annotated[int, Field(ge=1, le=5, strict=True)]
    passages: list[str] = []
    reference: str | None = None


Label = PairLabel | ScoreLabel


class Calibration(_Closed):
    """How one version of a judge did on one set of labels.

    Attributes:
        version: of the judge (``Form.version``).
        served: the models that answered, as their server names them.
        labels: SHA-256 of the labels.
        right: share of labels where the judge gave people's verdict; for pairs in both orders.
        same: share of pairs with the same valid verdict in both orders.
        accuracy: of single calls, INVALID counted as wrong; for pairs the mean of both orders.
        flip_rate: share of pairs, of those valid in both orders, where the orders disagree.
        kappa: Cohen's, squared weights for scores; no verdict agrees with nobody.
        invalid: labels without a verdict because a call failed, by kind.
        confusion: people's label -> judge's -> count.
    """

    version: str
    form: str
    model: str
    served: list[str]
    labels: str
    n: int
    right: Interval
    same: Interval | None = None
    accuracy: float
    flip_rate: Interval | None = None
    kappa: Interval
    invalid: dict[str, int]
    confusion: dict[str, dict[str, int]]


def uncalibrated(found: Calibration | None, floor: float, served: Iterable[str] = ()) -> str | None:
    """Why scores of this judge may neither block nor pass anything; None: they may.

    Args:
        floor: of kappa, by the policy. The interval's lower end must reach it: five labels that
            agree prove little.
        served: models that gave the scores, as the server names them.
    """
    if found is None:
        return "nobody has compared this version of the judge with people's labels"
    if found.kappa.low < floor or found.kappa.low <= 0:  # a silent judge has 0
        value = found.kappa
        return (
            f"kappa {value.value:.2f} [{value.low:.2f}, {value.high:.2f}] over {found.n} labels "
            f"is not shown to reach {floor:g}"
        )
    if other := sorted(set(served) - set(found.served)):
        return f"calibrated with {', '.join(found.served)}, answered by {', '.join(other)}"
    return None


def read_labels(path: Path) -> list[Label]:
    """Labels of a file. Raises InputError naming every bad line, never its words."""
    adapter: TypeAdapter[Label] = TypeAdapter(Label)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The labels cannot be read: {error}", where=str(path)) from None
    labels, offenders = list[Label](), list[str]()
    for number, line in enumerate(lines, start=1):
        try:
            labels.append(adapter.validate_json(line))
        except ValidationError as error:
            shape = "PairLabel" if '"better"' in line else "ScoreLabel"
            told = [e for e in error.errors() if shape in e["loc"]] or error.errors()
            where = ".".join(map(str, told[0]["loc"]))
            offenders.append(f"line {number}: {where}: {told[0]['msg']}")
    if not labels and not offenders:
        offenders.append("the file is empty")
    if offenders:
        raise InputError(
            "The labels cannot be used.",
            where=str(path),
            offenders=offenders,
            next="a line is {question, first, second, better} or {question, answer, criterion, "
            "score}; passages and reference as the judge shall see them",
        )
    return labels


async def calibrate(judge: Judge, labels: Sequence[Label]) -> list[Calibration]:
    """Judge every label and compare; a record for each form that the labels are of."""
    digest = text_sha("\n".join(label.model_dump_json() for label in labels))
    pairs = [label for label in labels if isinstance(label, PairLabel)]
    found = [
        await _of_pairs(judge, [p for p in pairs if bool(p.passages) is grounded], grounded, digest)
        for grounded in sorted({bool(p.passages) for p in pairs})
    ]
    for criterion in rubric.CRITERIA:
        of_it = [x for x in labels if isinstance(x, ScoreLabel) and x.criterion == criterion]
        if of_it:
            found.append(await _of_scores(judge, of_it, criterion, digest))
    return found


async def _of_pairs(
    judge: Judge, labels: Sequence[PairLabel], grounded: bool, digest: str
) -> Calibration:
    votes = await asyncio.gather(
        *(
            pairwise.compare(
                judge,
                Pair(str(n), x.question, x.first, x.second, dict(enumerate(x.passages, start=1))),
            )
            for n, x in enumerate(labels)
        )
    )
    form = pairwise.form(grounded)
    return of_votes(
        [label.better for label in labels],
        votes,
        version=judge.version(form),
        form=form.name,
        model=judge.endpoint.model,
        labels=digest,
    )


def of_votes(people: Sequence[str], votes: Sequence[Vote], **names: str) -> Calibration:
    """The record of votes on pairs; ``names`` are its fields version, form, model and labels."""
    choices: list[str | None] = [vote.choice for vote in votes]
    valid = sum(None not in vote.choices for vote in votes)
    flips = sum(vote.position_bias for vote in votes)
    single = [(p, choice) for p, vote in zip(people, votes, strict=True) for choice in vote.choices]
    return Calibration(
        **names,
        served=sorted(set().union(*(vote.served for vote in votes))),
        n=len(votes),
        right=share(sum(p == c for p, c in zip(people, choices, strict=True)), len(votes)),
        same=share(valid - flips, len(votes)),
        accuracy=round(sum(p == c for p, c in single) / max(1, len(single)), 6),
        flip_rate=share(flips, valid),
        kappa=kappa(people, choices),
        invalid=_kinds(v.reason for v in votes if v.choice is None and not v.position_bias),
        confusion=_confusion(people, choices),
    )


async def _of_scores(
    judge: Judge, labels: Sequence[ScoreLabel], criterion: str, digest: str
) -> Calibration:
    async def one(label: ScoreLabel) -> tuple[int, str] | Invalid:
        passages = dict(enumerate(label.passages, start=1))
        item = Item("", label.question, label.answer, passages, label.reference)
        try:
            found = await rubric.grade(judge, criterion, item)
        except Invalid as problem:
            return problem
        return found.fields["score"], found.served

    given = await asyncio.gather(*map(one, labels))
    people = [label.score for label in labels]
    scores = [None if isinstance(item, Invalid) else item[0] for item in given]
    right = sum(p == s for p, s in zip(people, scores, strict=True))
    form = rubric.form(criterion)
    return Calibration(
        version=judge.version(form),
        form=form.name,
        model=judge.endpoint.model,
        labels=digest,
        served=sorted({item[1] for item in given if not isinstance(item, Invalid)}),
        n=len(labels),
        right=share(right, len(labels)),
        accuracy=round(right / len(labels), 6),
        kappa=kappa(people, scores, squared),
        invalid=_kinds(str(item) for item in given if isinstance(item, Invalid)),
        confusion=_confusion(people, scores),
    )


def _kinds(reasons: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter((reason or "").split(":")[0] for reason in reasons).items()))


def _confusion(people: Sequence[Any], judge: Sequence[Any]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for person, said in sorted(zip(map(str, people), judge, strict=True), key=str):
        row = counts.setdefault(person, {})
        name = NO_VERDICT if said is None else str(said)
        row[name] = row.get(name, 0) + 1
    return counts


def read_store(path: Path) -> dict[str, Calibration]:
    """Calibrations by version; none where there is no file. Raises InputError for a broken one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: Calibration.model_validate(value) for name, value in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"The judges' calibrations cannot be read: {error}",
            where=str(path),
            next="restore it from git, or calibrate again",
        ) from None


def write_store(path: Path, found: Mapping[str, Calibration]) -> None:
    """Write all calibrations, whole or not at all."""
    data = {name: item.model_dump() for name, item in sorted(found.items())}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
