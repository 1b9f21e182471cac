"""Words of a text as 64-bit hashes, and hashes of every run of n of them.

In: a text. Out: numpy arrays. The same on every machine and in every process (BLAKE2b, not
Python's salted ``hash``). Two different shingles share a hash with probability 5e-20; where
:mod:`near_duplicates` counts shingles, it counts these.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORD = re.compile(r"\w+")
#: Odd multipliers (of splitmix64 and MurmurHash3): a run's hash depends on the order of its words.
_STEP = 0x9E3779B97F4A7C15
_MIX = 0xFF51AFD7ED558CCD
_LIMIT = 1_000_000  # words that are remembered


class _Hashes(dict[str, int]):
    """Hashes of words, remembered: nine words of ten were seen before."""

    def __missing__(self, word: str) -> int:
        if len(self) > _LIMIT:
            self.clear()
        value = self[word] = hash64(word)
        return value


_KNOWN = _Hashes()


def hash64(text: str) -> int:
    """64 bits of BLAKE2b of the UTF-8 text; lone surrogates are hashed, too."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def word_hashes(text: str) -> NDArray[Any]:
    """uint64 hash of each word, in order; case and punctuation do not count."""
    import numpy as np

    words = WORD.findall(text.lower())
    return np.fromiter(map(_KNOWN.__getitem__, words), dtype=np.uint64, count=len(words))


def runs(hashes: NDArray[Any], length: int) -> NDArray[Any]:
    """uint64 hash of every run of ``length`` words; of all words where there are fewer."""
    import numpy as np

    length = min(length, len(hashes))
    if not length:
        return hashes
    total = np.zeros(len(hashes) - length + 1, dtype=np.uint64)
    for place in range(length):
        total *= np.uint64(_STEP)
        total += hashes[place : len(hashes) - length + 1 + place]
    total ^= total >> np.uint64(33)
    total *= np.uint64(_MIX)
    total ^= total >> np.uint64(33)
    return total
