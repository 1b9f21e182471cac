"""Which threshold the semantic cache may have, from labelled questions.

    python -m serving.gateway.cache.calibrate --banking77 FOLDER --max-wrong 0.01
    python -m serving.gateway.cache.calibrate --pairs FILE

In: questions with intents (train.csv and test.csv with ``text,category``, in random order as a
stream of requests: each is looked up among those before it that missed, as in the gateway), or
pairs (CSV with ``a,b,same``: a request, the nearest cached question, and 1 if one answer serves
both). A hit is wrong when the intent is another one. Out: curve.csv and report.html in ``--out``,
the threshold on stdout; exit code 3 when no threshold holds.

The threshold is chosen on one half: the most hits for which the wrong share of all requests is at
most ``--max-wrong`` by its upper bound, corrected for the 80 thresholds that are tried (Bonferroni:
99.94 % each). The other half had no say and confirms it, by the 95 % bound, or does not. Bounds are
Clopper-Pearson's, one-sided: exact for independent requests. Requests of one stream share a cache,
so they are a little optimistic; two halves that differ much show by how much.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts import offline
from contracts.errors import GateError, InputError, RatchetError
from contracts.settings import Settings
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.meaning import fingerprint
from serving.gateway.cache.semantic import MAX_QUESTION

if TYPE_CHECKING:
    import numpy as np

    #: Counts (requests, hits, wrong) at a threshold.
    Replay = Callable[[float], tuple[int, int, int]]

CONFIDENCE = 0.95
THRESHOLDS = [round(0.80 + 0.0025 * step, 4) for step in range(80)]


@dataclass(frozen=True)
class Point:
    """One threshold on one half; bounds are 95 % upper ones."""

    threshold: float
    requests: int
    hits: int
    wrong: int

    @property
    def rate(self) -> float:
        return self.hits / self.requests

    @property
    def of_requests(self) -> tuple[float, float]:
        """Wrong of all requests, and its upper bound."""
        return self.wrong / self.requests, upper(self.wrong, self.requests)

    @property
    def of_hits(self) -> tuple[float, float]:
        """Wrong of hits, and its upper bound."""
        return self.wrong / max(1, self.hits), upper(self.wrong, self.hits)

    def row(self) -> dict[str, float]:
        (wrong, bound), (wrong_hits, bound_hits) = self.of_requests, self.of_hits
        return {
            **asdict(self),
            "hit_rate": round(self.rate, 5),
            "wrong_of_requests": round(wrong, 5),
            "wrong_of_requests_upper": round(bound, 5),
            "wrong_of_hits": round(wrong_hits, 5),
            "wrong_of_hits_upper": round(bound_hits, 5),
        }


def upper(wrong: int, count: int, confidence: float = CONFIDENCE) -> float:
    """Clopper-Pearson's one-sided upper bound of a share; 1 where nothing was counted."""
    from scipy.stats import beta

    return 1.0 if wrong >= count else float(beta.ppf(confidence, wrong + 1, count - wrong))


def choose(points: Sequence[Point], max_wrong: float) -> Point | None:
    """The point with the most hits whose bound holds, all of them at once; None: there is none."""
    each = 1 - (1 - CONFIDENCE) / len(points)
    held = [
        point
        for point in points
        if point.hits and upper(point.wrong, point.requests, each) <= max_wrong
    ]
    return max(held, key=lambda point: (point.hits, point.threshold), default=None)


def stream(
    texts: Sequence[str], labels: Sequence[str], vectors: np.ndarray, order: Sequence[int]
) -> Replay:
    """Requests in this order against a cache that starts empty, by the rules of the gateway."""
    import numpy as np

    index = [number for number in order if len(texts[number].encode()) <= MAX_QUESTION]
    prints: dict[object, int] = {}
    same = np.array(
        [prints.setdefault(fingerprint(texts[number]), len(prints)) for number in index]
    )
    intents = np.array([labels[number] for number in index])
    near = vectors[index] @ vectors[index].T
    near[same[:, None] != same[None, :]] = -1.0

    def replay(threshold: float) -> tuple[int, int, int]:
        kept = np.zeros(len(index), dtype=bool)
        hits = wrong = 0
        for at in range(len(index)):
            scores = np.where(kept[:at], near[at, :at], -1.0)
            best = int(scores.argmax()) if at else 0
            if at and scores[best] >= threshold:
                hits += 1
                wrong += bool(intents[best] != intents[at])
            else:
                kept[at] = True
        return len(order), hits, wrong

    return replay


def pairs(
    rows: Sequence[tuple[str, str, bool]], vectors: np.ndarray, order: Sequence[int]
) -> Replay:
    """Each pair is one request and the question that is nearest to it in the cache.

    ``vectors``: of all ``a``, then of all ``b``.
    """
    count = len(rows)
    scores = (vectors[:count] * vectors[count:]).sum(1)
    eligible = [
        max(len(a.encode()), len(b.encode())) <= MAX_QUESTION and fingerprint(a) == fingerprint(b)
        for a, b, _ in rows
    ]

    def replay(threshold: float) -> tuple[int, int, int]:
        hits = [n for n in order if eligible[n] and scores[n] >= threshold]
        return len(order), len(hits), sum(not rows[n][2] for n in hits)

    return replay


def read_banking77(folder: Path) -> tuple[list[str], list[str]]:
    """Texts and intents of train.csv and test.csv."""
    rows = [row for name in ("train.csv", "test.csv") for row in _rows(folder / name)]
    return [row["text"] for row in rows], [row["category"] for row in rows]


def read_pairs(path: Path) -> list[tuple[str, str, bool]]:
    rows = _rows(path)
    wrong = [
        f"line {number}: same is {row.get('same')!r}, not 0 or 1"
        for number, row in enumerate(rows, 2)
        if not row.get("a") or not row.get("b") or row.get("same") not in ("0", "1")
    ]
    if wrong or len(rows) < 2:
        raise InputError(
            "These are no labelled pairs.", where=str(path), offenders=wrong[:20],
            next="write CSV with the columns a, b and same",
        )  # fmt: skip
    return [(row["a"], row["b"], row["same"] == "1") for row in rows]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The questions cannot be read: {error}", where=str(path)) from None


def calibrate(
    halves: tuple[Replay, Replay], max_wrong: float
) -> tuple[list[Point], list[Point], Point | None, Point | None]:
    """Curves of both halves; what was chosen on the first, and the same threshold on the second."""
    first, second = (
        [Point(threshold, *half(threshold)) for threshold in THRESHOLDS] for half in halves
    )
    chosen = choose(first, max_wrong)
    confirmed = next(
        (point for point in second if chosen and point.threshold == chosen.threshold), None
    )
    return first, second, chosen, confirmed


def told(name: str, point: Point) -> str:
    (wrong, bound), (of_hits, of_hits_bound) = point.of_requests, point.of_hits
    return (
        f"{name}: threshold {point.threshold:.4f}, {point.requests} requests, "
        f"hits {point.rate:.1%}, wrong {wrong:.2%} of requests (<= {bound:.2%}), "
        f"{of_hits:.2%} of hits (<= {of_hits_bound:.2%})"
    )


def write(out: Path, title: str, halves: dict[str, list[Point]], summary: str, good: bool) -> None:
    """curve.csv and report.html."""
    from resources.report import (
        COLOURS,
        badge,
        figure_png,
        html_report,
        image,
        new_figure,
        section,
        table,
    )

    out.mkdir(parents=True, exist_ok=True)
    rows = [{"half": name, **point.row()} for name, points in halves.items() for point in points]
    with (out / "curve.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = new_figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    for colour, (name, points) in zip(COLOURS, halves.items(), strict=False):
        rates = [100 * point.rate for point in points]
        for axes, share in ((left, "of_requests"), (right, "of_hits")):
            found = [getattr(point, share) for point in points]
            axes.plot(rates, [100 * value for value, _ in found], color=colour, label=name)
            axes.plot(rates, [100 * bound for _, bound in found], color=colour, ls=":", lw=1)
    for axes, of in ((left, "requests"), (right, "hits")):
        axes.set_xlabel("hits, % of requests")
        axes.set_ylabel(f"wrong, % of {of}")
        axes.set_ylim(0, 8)
        axes.grid(alpha=0.3)
    left.legend()
    picture = image(figure_png(figure), "wrong answers over the hit rate, with upper bounds")
    columns = list(rows[0])
    page = html_report(
        title,
        [
            section("Result", summary),
            section("Curve", "Dotted: 95 % upper bounds (Clopper-Pearson, one-sided).", picture),
            section("Numbers", table(rows, columns)),
        ],
        badge("confirmed" if good else "not confirmed", good),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Read, embed, replay, write, tell. Raises GateError when no threshold holds."""
    import numpy as np

    from contracts.params import Vectors
    from resources.embedding import open_embedder

    params = Vectors(model=arguments.model, batch=64, dtype="float32")
    embedder = open_embedder(params, None, threads=1, device="cpu")
    rng = np.random.default_rng(arguments.seed)

    def halves(count: int) -> tuple[list[int], list[int]]:
        order = rng.permutation(count).tolist()
        return order[: count // 2], order[count // 2 :]

    if arguments.pairs:
        rows = read_pairs(arguments.pairs)
        vectors = embedder.embed([a for a, _, _ in rows] + [b for _, b, _ in rows])
        orders = halves(len(rows))
        both = pairs(rows, vectors, orders[0]), pairs(rows, vectors, orders[1])
    else:
        texts, labels = read_banking77(arguments.banking77)
        vectors = embedder.embed(texts)
        orders = halves(len(texts))
        both = stream(texts, labels, vectors, orders[0]), stream(texts, labels, vectors, orders[1])
    first, second, chosen, confirmed = calibrate(both, arguments.max_wrong)
    good = bool(confirmed and confirmed.of_requests[1] <= arguments.max_wrong)
    lines = [told("chosen on one half", chosen)] if chosen else ["no threshold holds"]
    lines += [told("on the other half", confirmed)] if confirmed else []
    out = arguments.out or settings.state_dir / "cache-calibration"
    curves = {"chosen on": first, "confirmed on": second}
    write(out, "Threshold of the semantic cache", curves, "; ".join(lines), good)
    print(*lines, f"curve: {out / 'curve.csv'}, {out / 'report.html'}", sep="\n")
    if not good or chosen is None:
        raise GateError(
            f"No threshold is confirmed to be wrong in at most {arguments.max_wrong:.2%} of "
            "requests.",
            where=str(out / "report.html"),
            next="bring more questions, allow more, or leave the semantic cache off",
        )
    print(f"cache.semantic.threshold: {chosen.threshold}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", type=Path, help="CSV with a, b, same")
    banking = os.environ.get("RATCHET_BANKING77")
    source.add_argument(
        "--banking77", type=Path, default=Path(banking) if banking else None,
        help="folder with train.csv and test.csv; RATCHET_BANKING77 by default",
    )  # fmt: skip
    parser.add_argument("--max-wrong", type=float, default=0.01, help="share of all requests")
    parser.add_argument("--model", default=Semantic().model)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.pairs and not arguments.banking77:
        parser.error("give --pairs or --banking77")
    offline.apply()
    try:
        run(arguments, Settings.from_env())
    except RatchetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
