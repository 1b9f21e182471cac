"""How demanding a request is: fast, standard or complex; standard when in doubt.

A multinomial logistic regression over a dozen counts of the last user text, with its probabilities
calibrated (temperature) and its weights in tiers.json: about 30 us for a short prompt and bounded
for long ones. It reads words and not meaning; benchmarks/routing_tiers.py trains it, says how good
it is on held-out prompts and writes the file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from serving.gateway.api_request import ApiRequest
from serving.gateway.routing.config import TIERS, Tier

MODEL = Path(__file__).with_name("tiers.json")
DEFAULT: Tier = "standard"
#: Characters that are read: the beginning and the end, where tasks stand.
HEAD, TAIL = 3000, 1000


#: Kinds of words. A star stands for any ending.
_WORDS = {
    "computing": """python sql java* rust code* algorithm* program* api* database* kubernetes
        server*
        regex script* class schema* thread* latency cache* function* query""",
    "math": """prove proof integral* derivat* equation* probabilit* matri* theorem* solve calculat*
        inequalit* converge* optim* expected many variance compute density""",
    "hard": """design implement* architect* deriv* analy* debug* refactor* compar* plan step* trade*
        evaluat* review* strateg* propos* construct* develop* detail* comprehensive justif* assum*
        reason* investigat* diagnos* migrat* edge complexity recommend* risks assess* discuss""",
    "easy": """name list defin* translat* convert suggest* synonym* antonym* spell* classif* capital
        fix correct* thank* hello hi add give find yes which where much""",
    "writing": """write generat* story poem essay summar* explain* describ* advice dialogue rewrit*
        paragraph email letter draft article differen* outline headline advantages""",
    "limits": """must should without least most only each every constraint* including given follow*
        then also ensure both under while keep including""",
    "small": "one two three word short brief quick single sentence slogan joke tips example",
    "fact": "what what's who when where which can is do does",
    "why": "how why",
}
FEATURES = ("length", "lines", "sentences", "code", "numbers", *_WORDS)
_TOKEN = re.compile(r"[a-z']+")
_SIGNS = ("```", "{", "}", ";", "()", "==", "->", "[", "`")


def _table() -> tuple[dict[str, list[int]], dict[str, list[tuple[str, int]]]]:
    """Whole words, and beginnings of words by their first three letters -> places in FEATURES."""
    whole: dict[str, list[int]] = {}
    begin: dict[str, list[tuple[str, int]]] = {}
    for kind, words in _WORDS.items():
        place = FEATURES.index(kind)
        for word in words.split():
            if word.endswith("*"):
                begin.setdefault(word[:3], []).append((word[:-1], place))
            else:
                whole.setdefault(word, []).append(place)
    return whole, begin


_WHOLE, _BEGIN = _table()


def features(text: str) -> list[float]:
    """Numbers about a text, in the order of FEATURES: logarithms of counts. Linear in what is
    read of it, whatever it holds."""
    size = len(text)
    if size > HEAD + TAIL:
        text = text[:HEAD] + "\n" + text[-TAIL:]
    found = [0] * len(FEATURES)
    found[0], found[1] = size, text.count("\n")
    found[2] = text.count(". ") + text.count("? ") + text.count("! ")
    found[3] = sum(map(text.count, _SIGNS))
    found[4] = len(re.findall(r"\d+", text))
    for word in _TOKEN.findall(text.lower()):
        for place in _WHOLE.get(word, ()):
            found[place] += 1
        for beginning, place in _BEGIN.get(word[:3], ()):
            found[place] += word.startswith(beginning)
    return [math.log1p(value) for value in found]


@dataclass(frozen=True)
class Classifier:
    """Weights (tiers x features) and biases per tier, calibrated; a probability below ``sure`` is
    a doubt."""

    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]
    sure: float

    @classmethod
    def load(cls, path: Path = MODEL) -> Classifier:
        """Read a file that the training script wrote; ValueError when it is of other features."""
        value = json.loads(path.read_text(encoding="utf-8"))
        if tuple(value["features"]) != FEATURES or tuple(value["tiers"]) != TIERS:
            raise ValueError(f"{path.name} is of other features: run benchmarks/routing_tiers.py")
        return cls(
            tuple(tuple(row) for row in value["weights"]), tuple(value["biases"]), value["sure"]
        )

    def probabilities(self, text: str) -> dict[Tier, float]:
        """Of each tier, summing to 1."""
        values = features(text)
        scores = [
            bias + sum(weight * value for weight, value in zip(row, values, strict=True))
            for row, bias in zip(self.weights, self.biases, strict=True)
        ]
        most = max(scores)
        powers = [math.exp(score - most) for score in scores]
        total = sum(powers)
        return {tier: power / total for tier, power in zip(TIERS, powers, strict=True)}

    def of_text(self, text: str) -> Tier:
        """The tier of one text."""
        found = self.probabilities(text)
        tier = max(found, key=found.__getitem__)
        return tier if found[tier] >= self.sure else DEFAULT

    def tier(self, request: ApiRequest) -> Tier:
        """The tier of a request: of its last text. A request with tools or a schema, which no
        training text had, is never taken for less than the default."""
        texts = request.texts()
        tier = self.of_text(texts[-1]) if texts else DEFAULT
        rich = request.body.get("tools") or request.body.get("response_format")
        return DEFAULT if rich and tier == "fast" else tier
