"""The calibration: its bound, its choice, its replay against the gateway's own, its command."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import InputError
from serving.gateway.cache import Hit
from serving.gateway.cache.calibrate import (
    Point,
    calibrate,
    choose,
    main,
    pairs,
    read_pairs,
    stream,
    upper,
)
from tests.serving.cache_requests import Table, answer, runs, scope, semantic_cache


@pytest.mark.parametrize(
    ("wrong", "count", "bound"),
    # Rule of three, exact: 1 - 0.05 ** (1/n); the others solve P(X <= wrong) = 0.05 (summed below).
    [(0, 100, 1 - 0.05**0.01), (3, 100, None), (40, 5_000, None)],
)
def test_the_bound_is_clopper_pearsons(wrong: int, count: int, bound: float | None) -> None:
    found = upper(wrong, count)
    if bound is not None:
        assert found == pytest.approx(bound, rel=1e-9)
    term = total = (1 - found) ** count
    for k in range(1, wrong + 1):
        term *= (count - k + 1) / k * found / (1 - found)
        total += term
    assert total == pytest.approx(0.05, rel=1e-6)
    assert (upper(0, 0), upper(5, 5)) == (1.0, 1.0)


def test_the_most_hits_that_hold_are_chosen() -> None:
    points = [
        Point(0.80, 1000, 600, 60),
        Point(0.89, 1000, 400, 4),  # at most 0.91 %, but not as one of six that were tried
        Point(0.90, 1000, 300, 2),  # at most 0.86 % as one of six
        Point(0.91, 1000, 300, 2),
        Point(0.92, 1000, 200, 8),  # not monotonous: chance
        Point(0.99, 1000, 0, 0),
    ]
    chosen = choose(points, 0.01)
    assert chosen is not None and chosen.threshold == 0.91
    assert choose(points, 0.001) is None
    assert choose([Point(0.99, 10_000, 0, 0)], 0.01) is None  # no hits are no cache


def unit(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_a_stream_is_looked_up_among_what_missed() -> None:
    texts = ["a", "b", "c", "d 5", "x" * 300]
    vectors = unit(0, 10, 20, 0, 0)
    replay = stream(texts, ["p", "p", "q", "p", "p"], vectors, range(5))
    near = float(np.cos(np.radians(11)))
    # b hits a; c is near b only, which was not kept; d has a number; the last is too long.
    assert replay(near) == (5, 1, 0)
    assert replay(float(np.cos(np.radians(21)))) == (5, 2, 1)  # c hits a: another intent
    assert stream(texts, ["p"] * 5, vectors, [2, 1, 0])(near) == (3, 1, 0)


def test_the_replay_is_what_the_gateway_does() -> None:
    """The same questions through the tier itself: the same hits, the same wrong ones."""
    rng = np.random.default_rng(2)
    texts = [
        f"question {'not ' * (n % 2)}{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(120)
    ]
    vectors = rng.normal(size=(120, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [str(n % 5) for n in range(120)]
    table = Table(**dict(zip(texts, vectors.tolist(), strict=True)))
    seen = {"hits": 0, "wrong": 0}

    @runs
    async def live() -> None:
        async with semantic_cache(embedder=table, threshold=0.95) as (cache, _):
            for text, label in zip(texts, labels, strict=True):
                found = await cache.lookup(scope(text))
                if isinstance(found, Hit):
                    seen["hits"] += 1
                    seen["wrong"] += found.answer.text != label
                else:
                    found.put(answer(label))
                    assert cache.semantic is not None
                    await cache.semantic.flush()

    live()
    assert stream(texts, labels, vectors, range(120))(0.95) == (120, seen["hits"], seen["wrong"])
    assert 0 < seen["wrong"] < seen["hits"] < 110


def test_pairs_hit_when_they_are_near_and_nothing_differs() -> None:
    rows = [("a", "b", True), ("a", "b 5", False), ("a", "c", False), ("a", "d", True)]
    vectors = np.concatenate([unit(0, 0, 0, 0), unit(5, 0, 5, 40)])
    assert pairs(rows, vectors, range(4))(0.9) == (4, 2, 1)
    assert pairs(rows, vectors, [0, 3])(0.5) == (2, 2, 0)


def test_the_bound_holds_on_the_other_half_as_often_as_it_says() -> None:
    """100 worlds in which nearness says how often a hit is wrong. The chosen threshold's true rate
    may be above the limit in 5 of them: the choice is corrected for the thresholds tried."""
    rng, above = np.random.default_rng(5), 0
    for _ in range(100):
        scores = rng.random(4_000)
        bad = rng.random(4_000) < (1 - scores) ** 2

        def half(
            threshold: float, s: np.ndarray = scores, b: np.ndarray = bad
        ) -> tuple[int, int, int]:
            hits = s >= threshold
            return len(s), int(hits.sum()), int(b[hits].sum())

        _, _, chosen, confirmed = calibrate((half, half), 0.001)
        if chosen is None or confirmed is None:
            continue
        truth = (1 - chosen.threshold) ** 3 / 3  # of all requests
        above += truth > 0.001
    assert above <= 0.05 * 100


def test_what_is_no_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,same\nx,y,1\nx,,0\nx,y,yes\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 3[\s\S]*line 4"):
        read_pairs(path)


@pytest.mark.slow
def test_the_command_from_pairs_to_a_threshold(tmp_path: Path, repository: Path) -> None:
    """The real model, 100 pairs; through `ratchet`, which starts the process (3 s of imports)."""
    path, out = tmp_path / "pairs.csv", tmp_path / "out"
    things = ["card", "account", "password", "address", "invoice", "refund", "order", "loan"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "same"])
        for number in range(100):
            thing, other = things[number % 8], things[(number + 3) % 8]
            writer.writerow([f"How do I change my {thing}?", f"how can I change my {thing}", 1])
            writer.writerow([f"How do I change my {thing}?", f"Why was my {other} refused?", 0])
    command = [sys.executable, "-m", "pipelines.cli", "cache", "calibrate"]
    command += ["--pairs", str(path), "--out", str(out), "--max-wrong", "0.1"]
    environ = {**os.environ, "RATCHET_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=repository, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cache.semantic.threshold: 0." in done.stdout
    with (out / "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["half"] for row in rows} == {"chosen on", "confirmed on"}
    assert "confirmed</span>" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_no_threshold_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.csv"
    rows = "".join(f"Where is it {'ab'[n % 2]}?,where is it {'ab'[n % 2]},0\n" for n in range(40))
    path.write_text("a,b,same\n" + rows, encoding="utf-8")
    assert main(["--pairs", str(path), "--out", str(tmp_path / "out")]) == 3
    assert "No threshold" in capsys.readouterr().err
