"""boilerplate: lines that stand in many documents (licence heads, navigation, notices).

In: for each text the hashes of its lines. Out: which lines are boilerplate, and how much of each
text is. A question never asks for such a line, and a document of nothing else answers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.defects.words import hash64

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Shorter lines ("Args:", "return None", ".. code-block:: python") repeat without being
#: boilerplate, and so do rulers: lines without a letter or digit.
MIN_LINE = 25
_SIGN = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Lines:
    """The lines of one text that count: hash and non-space characters of each.

    ``total`` is the non-space characters of all its lines.
    """

    hashes: NDArray[Any]  # uint64, as often as they stand in the text
    lengths: NDArray[Any]  # uint32
    total: int


@dataclass(frozen=True)
class Boilerplate:
    hashes: dict[int, int]  # hash of a boilerplate line -> number of texts that hold it
    shares: list[float]  # of each text, in order: the part of it that is boilerplate


def read_lines(text: str) -> Lines:
    """Hashes of lines of words of at least :data:`MIN_LINE` characters, white space collapsed."""
    import numpy as np

    hashes: list[int] = []
    lengths: list[int] = []
    total = 0
    for line in text.split("\n"):
        parts = line.split()
        count = sum(map(len, parts))
        total += count
        if count + len(parts) > MIN_LINE and _SIGN.search(line):
            hashes.append(hash64(" ".join(parts)))
            lengths.append(count)
    return Lines(np.array(hashes, dtype=np.uint64), np.array(lengths, dtype=np.uint32), total)


def boilerplate(texts: Sequence[Lines], min_documents: int) -> Boilerplate:
    """Lines that stand in at least ``min_documents`` of the texts, and their share of each."""
    import numpy as np

    if not texts:
        return Boilerplate({}, [])
    hashes = np.concatenate([lines.hashes for lines in texts])
    lengths = np.concatenate([lines.lengths for lines in texts])
    owner = np.repeat(np.arange(len(texts)), [len(lines.hashes) for lines in texts])
    values, line = np.unique(hashes, return_inverse=True)
    # A line counts once a text, however often it stands there.
    pairs = np.unique(line * len(texts) + owner)
    counts = np.bincount(pairs // len(texts), minlength=len(values))
    often = counts >= min_documents
    covered = np.bincount(owner, weights=lengths * often[line], minlength=len(texts))
    total = np.array([max(1, lines.total) for lines in texts])
    found = dict(zip(values[often].tolist(), counts[often].tolist(), strict=True))
    return Boilerplate(found, (covered / total).tolist())
