"""near_duplicates: texts that differ from an earlier one by a few words.

In: texts in order. Out: for each near copy the earlier text that it repeats, and how far. MinHash
signatures (datasketch, 128 permutations over word 5-shingles) with LSH find candidates; the true
Jaccard similarity of the shingles decides, so a signature's error (0.03 at 128 permutations) can
miss a pair at the very threshold and never condemns one.

Short texts are not judged: two docstrings of a dozen words that differ by "passed" and "failed"
have a similarity of 0.9 and opposite meanings. The first of a family stays, and each later text is
compared with texts that stay: a chain of small edits does not make its two ends copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.defects.words import runs, word_hashes

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHINGLE = 5
PERMUTATIONS = 128
SCHEME = "affine32"
EMPTY = (1 << 32) - 1  # every value of a signature of no shingle


@dataclass(frozen=True)
class NearCopy:
    of: int  # number of the text that stays
    jaccard: float


#: Candidates are sought from so much below the threshold: a signature's error is 0.03.
MARGIN = 0.1
#: Distinct shingles that a text needs to be judged.
MIN_SHINGLES = 25


def shingles(text: str) -> NDArray[Any]:
    """Sorted distinct hashes (uint64) of the text's word 5-shingles."""
    return shingles_of(word_hashes(text))


def shingles_of(words: NDArray[Any]) -> NDArray[Any]:
    """As :func:`shingles`, of the text's word hashes."""
    import numpy as np

    return np.unique(runs(words, SHINGLE))


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, scheme=SCHEME).permutations


def signature(found: NDArray[Any]) -> NDArray[Any]:
    """MinHash of a set of shingles: 128 values, uint32."""
    from datasketch import MinHash

    sketch = MinHash(
        num_perm=PERMUTATIONS, scheme=SCHEME, permutations=_permutations(), hashfunc=int
    )
    # Half of a shingle's bits: datasketch hashes 32-bit values. A block keeps memory at 16 MB.
    small = (found >> 32).tolist()
    for start in range(0, len(small), 1 << 15):
        sketch.update_batch(small[start : start + (1 << 15)])
    values: NDArray[Any] = sketch.hashvalues
    return values


def jaccard(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Shared shingles over all shingles of two sets from :func:`shingles`; 0 if both are empty."""
    import numpy as np

    shared = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


def near_duplicates(
    signatures: Sequence[NDArray[Any]],
    read: Callable[[int], NDArray[Any]],
    threshold: float,
) -> dict[int, NearCopy]:
    """Number of each near copy -> the earlier text that it repeats most.

    Args:
        signatures: of each text, in order.
        read: shingles of the text of that number; called for candidates only.
        threshold: Jaccard similarity from which two texts are copies.
    """
    from datasketch import MinHash, MinHashLSH

    # Weights: a candidate too many costs one comparison, one too few a copy in the index.
    lsh = MinHashLSH(threshold=threshold - MARGIN, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    permutations = _permutations()
    remembered = cache(read)
    found: dict[int, NearCopy] = {}
    for number, values in enumerate(signatures):
        if values.min() == EMPTY:  # a text without a word is like nothing
            continue
        sketch = MinHash(hashvalues=values, permutations=permutations, scheme=SCHEME)
        best: NearCopy | None = None
        for candidate in sorted(lsh.query(sketch)):
            one, other = remembered(number), remembered(candidate)
            value = jaccard(one, other)
            long_enough = min(len(one), len(other)) >= MIN_SHINGLES
            if long_enough and value >= threshold and (best is None or value > best.jaccard):
                best = NearCopy(candidate, value)
        if best:
            found[number] = best
        else:
            lsh.insert(number, sketch, check_duplication=False)
    return found
