"""Recorded verdicts of real judges, replayed through the whole path: client, parsing, both orders,
calibration.

    RATCHET_DATA=../shared/data python -m benchmarks.judges [--out FOLDER]

Needs LLMBar (princeton-nlp/LLMBar, MIT) as ``$RATCHET_DATA/llmbar``: pairs with gold labels and
what GPT-4, ChatGPT and LLaMA2 said about them in both orders. Each judge answers over HTTP from a
local server. Prints what the table of the literature says beside what came out; then breaks 30 % of
GPT-4's calls in 20 ways and prints whether any figure rose. Ends with PASS or FAIL. With ``--out``
the report of ``ratchet judge report`` is written there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.judge_server import Answer, JudgeServer
from resources.judging.calibration import Calibration, calibrate, read_labels
from resources.judging.judge import Endpoint, Judge, judged

#: From the recordings by another way of counting: (same verdict in both orders, right in both,
#: accuracy of single calls), in %.
EXPECTED = {
    ("natural", "GPT-4"): (95, 93, 96),
    ("natural", "LLaMA2"): (79, 70, 80),
    ("natural", "ChatGPT"): (71, 67, 82),
    ("adversarial_neighbor", "GPT-4"): (93, 75, 79),
    ("adversarial_neighbor", "LLaMA2"): (78, 13, 25),
    ("adversarial_neighbor", "ChatGPT"): (72, 5, 19),
}
BROKEN, SEEDS = 0.3, 20
#: Faults of a call that cost no time, and one that costs the deadline.
WAYS = ("garbage", "refusal", "truncated", "cut_off", "hang")
VERDICTS = {"Output (a)": "A", "Output (b)": "B"}


def recorded(rows: list[dict[str, Any]]) -> Answer:
    """What the judge said, by question and the answers in the order it saw them."""
    said: dict[tuple[str, str, str], str] = {}
    for row in rows:
        question, first, second = row["input"], row["output_1"], row["output_2"]
        plain, swapped = (row["results"][0][f"swap = {way}"] for way in ("False", "True"))
        said[question, first, second] = plain["completion"][0]
        said[question, second, first] = swapped["completion"][0]

    def answer(shown: Mapping[str, Any]) -> dict[str, str]:
        text = said[shown["question"], shown["answer_A"], shown["answer_B"]]
        return {"evidence": f"recorded: {text}", "verdict": VERDICTS.get(text.strip(), text)}

    return answer


def broken(answer: Answer, seed: int) -> Answer:
    """``answer`` where each call fails with a chance of :data:`BROKEN`, always the same ones."""

    def breaks(shown: dict[str, Any]) -> Mapping[str, Any] | str:
        chance = random.Random(f"{seed} {sorted(shown.items())}")
        return chance.choice(WAYS) if chance.random() < BROKEN else answer(shown)

    return breaks


def write_labels(dataset: Path, out: Path) -> Path:
    """Gold labels of an LLMBar folder in the form that ``ratchet judge calibrate`` reads."""
    rows = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    lines = [
        json.dumps(
            {
                "question": row["input"],
                "first": row["output_1"],
                "second": row["output_2"],
                "better": ("first", "second")[row["label"] - 1],
            }
        )
        for row in rows
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def replay(
    labels: Path, answer: Answer, model: str, caches: Path | None = None, deadline: float = 30.0
) -> Calibration:
    """The calibration of the judge that ``answer`` plays."""
    found = read_labels(labels)

    async def work(judge: Judge) -> list[Calibration]:
        return await calibrate(judge, found)

    with JudgeServer(answer, model) as server:
        endpoint = Endpoint(server.url, model, deadline=deadline, concurrent=16)
        (made,) = judged(endpoint, caches, work)
    return made


def compare(data: Path, folder: Path) -> tuple[bool, list[Calibration]]:
    """The table; True when every figure is the recordings' own."""
    good, found = True, []
    print(f"{'set':21} {'judge':8} {'same':>12} {'right in both':>14} {'accuracy':>12}  kappa")
    for (part, model), want in EXPECTED.items():
        labels = write_labels(data / part, folder / f"{part}.jsonl")
        rows = json.loads((data / part / f"{model}.json").read_text(encoding="utf-8"))
        made = replay(labels, recorded(rows), f"{model} on {part}", folder / "caches")
        found.append(made)
        assert made.same is not None
        got = [round(100 * share) for share in (made.same.value, made.right.value, made.accuracy)]
        good = good and tuple(got) == want and not made.invalid
        shown = [f"{value} ({wanted})" for value, wanted in zip(got, want, strict=True)]
        value = made.kappa
        print(
            f"{part:21} {model:8} {shown[0]:>12} {shown[1]:>14} {shown[2]:>12}  "
            f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
        )
    return good, found


def breaking(data: Path, folder: Path, whole: Calibration) -> bool:
    """True when no run with broken calls looks better than the whole one."""
    rows = json.loads((data / "natural" / "GPT-4.json").read_text(encoding="utf-8"))
    runs = [
        replay(folder / "natural.jsonl", broken(recorded(rows), seed), "GPT-4", deadline=0.5)
        for seed in range(SEEDS)
    ]
    best = max(runs, key=lambda made: made.kappa.value)
    failed = sum(sum(made.invalid.values()) for made in runs) / sum(made.n for made in runs)
    print(
        f"\n{BROKEN:.0%} of calls broken, {SEEDS} runs: {failed:.0%} of pairs without a verdict; "
        f"kappa {whole.kappa.value:.2f} -> at most {best.kappa.value:.2f}, "
        f"right {whole.right.value:.2f} -> at most {max(m.right.value for m in runs):.2f}"
    )
    return all(
        made.kappa.value <= whole.kappa.value and made.right.value <= whole.right.value
        for made in runs
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judges")
    parser.add_argument("--out", type=Path, help="folder of the report")
    given = parser.parse_args()
    data = Path(os.environ.get("RATCHET_DATA", "../shared/data")) / "llmbar"
    if not data.is_dir():
        print(f"{data} does not exist: set RATCHET_DATA to the folder that holds llmbar")
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.monotonic()
        good, found = compare(data, folder)
        calls = 2 * sum(made.n for made in found)
        print(f"{calls} calls in {time.monotonic() - begun:.1f} s")
        good = breaking(data, folder, found[0]) and good
    if given.out:
        from resources.judging.report import write_report

        print(f"report: {write_report(found, given.out, floor=0.4)}")
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
