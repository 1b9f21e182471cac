"""Train and judge the tier classifier of the gateway's router; write its weights.

    python -m benchmarks.routing_tiers --llmbar ../shared/data/llmbar \
        --banking ../shared/data/banking77 [--write]

Labels are ours, by one rubric: *fast* is answered in a phrase, a short list or one mechanical
change; *complex* needs several steps of reasoning, working code, a design, or a long answer under
many constraints; *standard* is the rest. They were given by one hand to LLMBar's 234 instructions
(MIT licence; the lists below) and to the prompts in routing_tiers.tsv (written for this). 80
questions of Banking77 (CC BY 4.0) stand for a help desk: fast. So accuracy here is agreement with
one rubric on short English prompts, and says nothing about other languages or about whether a
small model would in fact have failed.

Judged by 10-fold cross-validation, repeated 5 times: weights, temperature (fitted on inner folds)
and the doubt threshold never see the prompts that they are judged on, and duplicates stand in one
fold. The threshold is the smallest at which 85 % of what is called fast or complex on the training
folds is right.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from serving.gateway.routing.config import TIERS
from serving.gateway.routing.tiers import DEFAULT, FEATURES, MODEL, features

FAST = {
    "natural": "20 21 24 27 30 31 33 34 35 36 37 39 40 41 42 45 47 52 55 58 63 64 66 67 68 72 73 "
    "75 76 77 78 83 85 87 88 90 91 92 96 97 98 99",
    "adversarial_neighbor": "0 1 2 3 4 5 7 9 10 13 16 17 18 20 21 22 24 25 26 27 29 30 31 32 35 38 "
    "39 42 43 44 45 46 48 49 50 51 52 53 54 55 56 58 59 60 62 63 64 65 66 68 69 71 72 73 74 75 76 "
    "77 79 82 85 90 91 93 96 97 98 99 101 102 110 111 125 127 130 133",
}
COMPLEX = {
    "natural": "9 18 22 51 70 74 79 84 86",
    "adversarial_neighbor": "6 88 95 105 109 115 119 124 126 129",
}
PRECISION = 0.85
BANKING = 80


def prompts(llmbar: Path, banking: Path) -> tuple[list[str], np.ndarray]:
    """Texts and their tiers as indices."""
    found: dict[str, str] = {}
    for part in ("natural", "adversarial_neighbor"):
        fast, hard = (set(map(int, lists[part].split())) for lists in (FAST, COMPLEX))
        rows = json.loads((llmbar / part / "dataset.json").read_text(encoding="utf-8"))
        for number, row in enumerate(rows):
            tier = "fast" if number in fast else "complex" if number in hard else "standard"
            found.setdefault(row["input"], tier)
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines():
        tier, text = line.split("\t")
        found.setdefault(text, tier)
    with (banking / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:: len(rows) // BANKING][:BANKING]:
        found.setdefault(row["text"].strip(), "fast")
    return list(found), np.array([TIERS.index(tier) for tier in found.values()])


def fit(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights and biases for raw features, calibrated, and the doubt threshold."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    model = LogisticRegression(C=0.3, class_weight="balanced", max_iter=2000)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    held = cross_val_predict(model, (x - mean) / scale, y, cv=folds, method="decision_function")

    def loss(t: float) -> float:
        return -float(np.mean(np.log(soften(held / t)[np.arange(len(y)), y])))

    temperature = min(np.geomspace(0.2, 5, 100), key=loss)
    p = soften(held / temperature)
    best, sure = p.argmax(1), 0.99
    for level in np.arange(0.34, 0.99, 0.01):
        bold = (best != TIERS.index(DEFAULT)) & (p.max(1) >= level)
        if bold.any() and (best == y)[bold].mean() >= PRECISION:
            sure = float(level)
            break
    model.fit((x - mean) / scale, y)
    weights = model.coef_ / scale / temperature
    return weights, model.intercept_ / temperature - weights @ mean, sure


def soften(scores: np.ndarray) -> np.ndarray:
    """Softmax by rows."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def judge(x: np.ndarray, y: np.ndarray) -> dict[str, object]:
    """Out-of-fold figures of the whole procedure."""
    confusion, argmax, errors, n = np.zeros((3, 3)), [], [], 0
    confidences, hits = [], []
    for seed in range(5):
        for train, test in StratifiedKFold(10, shuffle=True, random_state=seed).split(x, y):
            weights, biases, sure = fit(x[train], y[train], seed)
            p = soften(x[test] @ weights.T + biases)
            best = p.argmax(1)
            given = np.where(p.max(1) >= sure, best, TIERS.index(DEFAULT))
            np.add.at(confusion, (y[test], given), 1)
            argmax += list(best == y[test])
            errors.append(given == y[test])
            confidences += list(p.max(1))
            hits += list(best == y[test])
            n += len(test)
    bins = np.digitize(confidences, np.linspace(0.34, 1, 8))
    c, h = np.array(confidences), np.array(hits)
    ece = sum(abs(c[bins == b].mean() - h[bins == b].mean()) * (bins == b).mean()
              for b in np.unique(bins))  # fmt: skip
    rows = confusion / confusion.sum(1, keepdims=True)
    return {
        "prompts": len(y),
        "accuracy_without_doubt": round(float(np.mean(argmax)), 3),
        "accuracy": round(float(np.mean(np.concatenate(errors))), 3),
        "always_standard": round(float((y == TIERS.index(DEFAULT)).mean()), 3),
        "given_standard": round(float(confusion[:, 1].sum() / n), 3),
        "precision": {t: round(float(confusion[i, i] / max(1, confusion[:, i].sum())), 3)
                      for i, t in enumerate(TIERS)},
        "share_given (rows: true tier)": {t: rows[i].round(3).tolist()
                                          for i, t in enumerate(TIERS)},
        "expected_calibration_error": round(float(ece), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llmbar", type=Path, default=Path("../shared/data/llmbar"))
    parser.add_argument("--banking", type=Path, default=Path("../shared/data/banking77"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    texts, y = prompts(options.llmbar, options.banking)
    x = np.array([features(text) for text in texts])
    figures = judge(x, y)
    print(json.dumps(figures, indent=1))
    if options.write:
        weights, biases, sure = fit(x, y, 0)
        value = {
            "features": list(FEATURES),
            "tiers": list(TIERS),
            "weights": weights.round(4).tolist(),
            "biases": biases.round(4).tolist(),
            "sure": round(sure, 2),
            "out_of_fold": figures,
        }
        MODEL.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
