"""leakage: whether texts that must stay apart stand in each other.

In: protected texts (evaluation questions, say) and other texts (documents, training prompts). Out:
every protected text that another one gives away, and how:

    exact    the same words
    ngram    a run of 13 words of it (all its words, where it has 6 to 12) stands in the other
    similar  their word 5-shingles have a Jaccard similarity of 0.8 or more (what MinHash estimates,
             counted exactly: only texts of like length are compared)

Case, punctuation and white space do not count. Lexical: a paraphrase passes; what must survive
paraphrase is kept apart by document, as stages/examples.py does. Used by the stage quality for
golden questions in documents (knowledge and evaluation).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.defects import near_duplicates
from stages.defects.words import WORD, runs, word_hashes

if TYPE_CHECKING:
    from numpy.typing import NDArray

NGRAM = 13
MIN_WORDS = 6  # "What is a gate?" may stand in any document
SIMILAR = 0.8
_ANCHOR = 5  # words of an n-gram that are looked up first


@dataclass(frozen=True)
class Leak:
    protected: str  # key of the protected text
    kind: str  # exact | ngram | similar
    detail: str  # the shared words, or the similarity


class Protected:
    """Protected texts, made ready to be looked for in many others.

    Args:
        texts: key -> text. Texts of fewer than :data:`MIN_WORDS` words are not protected.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        import numpy as np

        words = {key: _words(text) for key, text in sorted(texts.items())}
        self.words = {key: found for key, found in words.items() if len(found) >= MIN_WORDS}
        self.shingles = {
            key: near_duplicates.shingles(" ".join(w)) for key, w in self.words.items()
        }
        self._grams: dict[int, list[tuple[str, tuple[str, ...]]]] = {}
        for key, found in self.words.items():
            for gram in _grams(found):
                (anchor,) = runs(word_hashes(" ".join(gram[:_ANCHOR])), _ANCHOR).tolist()
                self._grams.setdefault(anchor, []).append((key, gram))
        self._anchors = np.array(sorted(self._grams), dtype=np.uint64)

    def leaks(self, text: str, hashes: NDArray[Any] | None = None) -> list[Leak]:
        """What ``text`` gives away: the strongest kind for each protected text, by key.

        ``hashes`` are the text's word hashes, where the caller has them already.
        """
        hashes = word_hashes(text) if hashes is None else hashes
        if len(hashes) < MIN_WORDS or not self.words:
            return []
        found = self._ngrams(text, runs(hashes, _ANCHOR))
        alike = list(self._alike(len(hashes)))
        if alike:
            words, shingles = _words(text), near_duplicates.shingles(text)
        for key in alike:
            value = near_duplicates.jaccard(self.shingles[key], shingles)
            if words == self.words[key]:
                found[key] = Leak(key, "exact", " ".join(words))
            elif value >= SIMILAR and key not in found:
                found[key] = Leak(key, "similar", f"Jaccard {value:.2f}")
        return [found[key] for key in sorted(found)]

    def _ngrams(self, text: str, anchors: NDArray[Any]) -> dict[str, Leak]:
        import numpy as np

        near = np.searchsorted(self._anchors[:-1], anchors)  # 10 times np.isin on short texts
        places = np.flatnonzero(self._anchors[near] == anchors).tolist()
        if not places:
            return {}
        words = _words(text)
        found: dict[str, Leak] = {}
        for place in places:
            for key, gram in self._grams[int(anchors[place])]:
                if tuple(words[place : place + len(gram)]) == gram:
                    found.setdefault(key, Leak(key, "ngram", " ".join(gram)))
        return found

    def _alike(self, count: int) -> Iterable[str]:
        """Protected texts that a text of so many words can be 0.8 alike to: of like length."""
        low, high = count * SIMILAR - _ANCHOR, count / SIMILAR + _ANCHOR
        return (key for key, words in self.words.items() if low <= len(words) <= high)


def leakage(protected: Mapping[str, str], texts: Mapping[str, str]) -> list[tuple[str, Leak]]:
    """(key of the text, leak) for every text that gives away a protected one, by key."""
    index = Protected(protected)
    return [(key, leak) for key in sorted(texts) for leak in index.leaks(texts[key])]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Runs of 13 words; the whole, where there are fewer."""
    length = min(NGRAM, len(words))
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
