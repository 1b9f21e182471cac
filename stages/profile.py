"""Stage ``profile``: the bundle under load, beside plain transformers, on this machine.

In: the bundle, ``answers.parquet`` (the prompts that the gate saw, and the candidate's answers).
Out: ``profile.png``, ``report.html`` and, last, ``profile.json``. Timings differ from run to run,
so a release does not name this folder; it is evidence, not an input.

The engine is started as it is deployed and asked over HTTP (``stages.profile_engine``); the peer is
``generate`` over the same merged weights in a process of its own (``stages.profile_peer``). Both
may use every core, one after the other; the HTTP client shares them with the engine. Equal lengths
show the price of a token, mixed lengths what continuous batching is for. At last the engine answers
the gate's questions, to see whether what is served says what was certified.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import InputError, ServiceError
from contracts.params import Params
from resources.scorers import deterministic as scoring
from stages import harness, profile_peer, tables
from stages.profile_engine import ask, engine, measure, peak_bytes, quantiles

PEER_SECONDS = 400.0
#: Shares of ``profile.max_tokens`` in the mixed run; the mean is 0.775.
MIX = (0.125, 0.25, 0.5, 1.0, 2.0)


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write the folder ``paths.out``; returns the headline figures."""
    block = params.profile
    rows = read_rows(paths.answers)
    launch = json.loads((paths.bundle / "launch.json").read_text(encoding="utf-8"))
    room = launch["args"]["max-model-len"] - round(max(MIX) * block.max_tokens)
    chats = [json.loads(row["messages"]) for row in spread(rows, block.prompts, room)]
    runs = {
        "equal": [block.max_tokens] * len(chats),
        "mixed": mixed_lengths(len(chats), block.max_tokens),
    }
    waiting = {"vllm": os.getloadavg()[0]}
    with engine(paths.bundle) as server:
        harness.progress(f"profile: engine ready after {server.seconds:.0f} s")
        timed = {
            name: measure(server, chats, lengths, block.concurrency, salt=name)
            for name, lengths in runs.items()
        }
        answers = ask(server, rows, params.answers.max_tokens, block.concurrency)
        peak = peak_bytes(server.session)
    harness.progress("profile: the same with transformers")
    waiting["transformers"] = os.getloadavg()[0]
    checkpoint = paths.bundle / launch["model"]
    peer = run_peer(checkpoint, launch["args"]["dtype"], chats, runs, block.concurrency)
    result = {
        "machine": {
            "kind": processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "peer_threads": peer["threads"],
            # One-minute load before each side began: other work on the machine spoils both.
            "load_average": {side: round(load, 2) for side, load in waiting.items()},
        },
        "load": {"prompts": len(chats), "concurrency": block.concurrency, "lengths": runs},
        "vllm": {"start_seconds": round(server.seconds, 2), "peak_bytes": peak, **timed},
        "transformers": {
            "peak_bytes": peer["peak_bytes"],
            **{name: peer_figures(found) for name, found in peer["runs"].items()},
        },
        "agreement": agreement(rows, answers),
    }
    result["ratio"] = {
        name: round(
            result["vllm"][name]["tokens_per_s"] / result["transformers"][name]["tokens_per_s"], 3
        )
        for name in runs
    }
    write(result, paths.out)
    return flat_metrics(result)


def processor() -> str:
    """The processor's name: timings of two machines of one kind can be compared."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.system()} {platform.machine()}"


# -- the load ----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The candidate's answered rows that had a prompt. Raises InputError under two."""
    columns = ["question_id", "system", "question", "messages", "answer", "prompt_tokens", "suite"]
    rows: list[dict[str, Any]] = tables.read_table(path, columns).to_pylist()
    found = [
        row
        for row in rows
        if row["system"] == "candidate" and row["messages"] and row["answer"] is not None
        if row["suite"] is None  # safety prompts are no usual load
    ]
    if len(found) < 2:
        raise InputError(f"{len(found)} answered prompts; a profile needs two.", where=str(path))
    return sorted(found, key=lambda row: str(row["question_id"]))


def spread(rows: Sequence[dict[str, Any]], count: int, room: int) -> list[dict[str, Any]]:
    """Up to ``count`` rows, evenly spaced, whose prompts have at most ``room`` tokens.

    None stands twice, because a repeated prompt is a cached one. Raises InputError under two rows.
    """
    fitting = [row for row in rows if row["prompt_tokens"] <= room]
    count = min(count, len(fitting))
    if count < 2:
        raise InputError(
            f"{count} prompts leave room for the longest answer; a profile needs two.",
            where="params.yaml: bundle.max_model_len, profile.max_tokens",
        )
    return [fitting[index * len(fitting) // count] for index in range(count)]


def mixed_lengths(count: int, tokens: int) -> list[int]:
    """Answer lengths that differ 16-fold, shuffled without chance: neighbours are unlike."""
    return [max(2, round(tokens * MIX[index * 2 % len(MIX)])) for index in range(count)]


# -- the peer ----------------------------------------------------------------------------------


def run_peer(
    checkpoint: Path,
    dtype: str,
    chats: Sequence[list[dict[str, str]]],
    runs: Mapping[str, list[int]],
    batch: int,
) -> dict[str, Any]:
    """Run ``stages.profile_peer``. Raises ServiceError with its last words."""
    job = {"checkpoint": str(checkpoint), "dtype": dtype, "chats": chats, "runs": runs}
    try:
        done = subprocess.run(
            [sys.executable, "-m", profile_peer.__name__],
            input=json.dumps(job | {"batch": batch}),
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise ServiceError("transformers failed.", next=error.stderr[-3000:]) from None
    except subprocess.TimeoutExpired:
        raise ServiceError(
            f"transformers took more than {PEER_SECONDS:g} s.", next="lower profile.prompts"
        ) from None
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def peer_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's outcome of one run, in the words of :func:`measure`."""
    return {
        "seconds": round(found["seconds"], 3),
        "tokens": found["tokens"],
        "tokens_per_s": round(found["tokens"] / found["seconds"], 1),
        "ttft_ms": quantiles(found["ttft"]),
        "tpot_ms": quantiles(found["tpot"]),
    }


# -- figures -----------------------------------------------------------------------------------


def agreement(rows: Sequence[Mapping[str, Any]], served: Sequence[str]) -> dict[str, Any]:
    """How far the served answers are those that the gate judged.

    They need not be equal to the letter: the gate's are float32 with the adapter beside the
    weights, the engine's bfloat16 with the adapter merged in.
    """
    pairs = [(str(row["answer"]), text) for row, text in zip(rows, served, strict=True)]
    overlaps = [
        1.0 if gate == text else scoring.overlap(text, gate) if gate and text else 0.0
        for gate, text in pairs
    ]
    differing = [
        {"question": row["question"], "certified": gate, "served": text}
        for row, (gate, text) in zip(rows, pairs, strict=True)
        if gate != text
    ]
    return {
        "answers": len(pairs),
        "equal": round(sum(gate == text for gate, text in pairs) / len(pairs), 6),
        "word_overlap": round(sum(overlaps) / len(overlaps), 6),
        "differing": differing[:5],
    }


def flat_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Headline figures by flat name."""
    flat = {
        f"{side}_{name}_tokens_per_s": result[side][name]["tokens_per_s"]
        for side in ("vllm", "transformers")
        for name in ("equal", "mixed")
    }
    flat |= {
        f"{side}_peak_mb": float(round(result[side]["peak_bytes"] / 1e6))
        for side in ("vllm", "transformers")
    }
    flat |= {f"ratio_{name}": ratio for name, ratio in result["ratio"].items()}
    return flat | {
        "vllm_ttft_p50_ms": result["vllm"]["equal"]["ttft_ms"]["p50"],
        "vllm_tpot_p50_ms": result["vllm"]["equal"]["tpot_ms"]["p50"],
        "agreement": result["agreement"]["equal"],
    }


def write(result: Mapping[str, Any], out: Path) -> None:
    """The folder: picture, page, and the figures last."""
    from resources import report

    harness.fresh_dir(out)
    png = picture(result)
    (out / "profile.png").write_bytes(png)
    times = [f"{kind} {q} ms" for kind in ("TTFT", "TPOT") for q in ("p50", "p95")]
    columns = ["engine", "lengths", "tokens/s", *times]
    rows = [
        [
            side,
            name,
            result[side][name]["tokens_per_s"],
            *(
                result[side][name][kind][q]
                for kind in ("ttft_ms", "tpot_ms")
                for q in ("p50", "p95")
            ),
        ]
        for name in ("equal", "mixed")
        for side in ("vllm", "transformers")
    ]
    load, same = result["load"], result["agreement"]
    page = report.html_report(
        "Profile",
        [
            report.section(
                "Speed", report.image(png, "tokens per second of both"), report.table(rows, columns)
            ),
            report.section(
                "How to read this",
                f"{load['prompts']} prompts, {load['concurrency']} at a time, on "
                f"{result['machine']['cpus']} cores. The time to the first token of transformers "
                "is that of a whole batch, without the wait for the batches before it.",
                busy(result["machine"]),
            ),
            report.section(
                "Peak memory",
                report.table(
                    [
                        [side, round(result[side]["peak_bytes"] / 1e6)]
                        for side in ("vllm", "transformers")
                    ],
                    ["engine", "MB"],
                ),
                "vLLM: the sum over its processes, the reserved KV cache included.",
            ),
            report.section(
                "Served against certified",
                f"{same['equal']:.1%} of {same['answers']} answers are equal to the letter to "
                f"those that the gate judged; mean word overlap {same['word_overlap']:.3f}.",
                report.table(same["differing"], ["question", "certified", "served"]),
            ),
        ],
        summary=f"vLLM gives {result['ratio']['equal']:.2f} times the tokens of transformers at "
        f"equal lengths and {result['ratio']['mixed']:.2f} times at mixed lengths.",
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    harness.write_json(out / "profile.json", result)


def busy(machine: Mapping[str, Any]) -> str:
    """What the load average says about how far to trust the figures."""
    load = machine["load_average"]
    shown = f"{load['vllm']:g} before vLLM and {load['transformers']:g} before transformers"
    if max(load.values()) > machine["cpus"]:
        return f"The machine was busy with other work (load {shown}): trust no ratio of this run."
    return f"The machine was quiet (load {shown})."


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG: tokens per second of both engines at equal and at mixed lengths."""
    from resources import report

    figure = report.new_figure(6, 3)
    axes = figure.subplots()
    for offset, colour, side in (
        (-0.2, report.COLOURS[0], "vllm"),
        (0.2, report.COLOURS[5], "transformers"),
    ):
        heights = [result[side][name]["tokens_per_s"] for name in ("equal", "mixed")]
        bars = axes.bar([0 + offset, 1 + offset], heights, 0.38, color=colour, label=side)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks([0, 1], ["equal lengths", "mixed lengths"])
    axes.set_ylabel("tokens per second")
    axes.margins(y=0.25)
    axes.legend(ncols=2, fontsize=8)
    return report.figure_png(figure)


if __name__ == "__main__":
    harness.main("profile", run, paths=("bundle", "answers", "out"))
