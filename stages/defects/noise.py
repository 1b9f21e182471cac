"""noise: characters that no writer types, and text that says the same thing over and over.

In: a text. Out: why it is noise, or None. Control and replacement characters come from binary
files and from bytes that could not be decoded; very low entropy from rulers, fillers and loops.
"""

from __future__ import annotations

import math
import re
import zlib

#: C0 and C1 controls but tab, line feed, form feed and carriage return; U+FFFD; private use.
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")

#: Share of such characters. Terminal pictures in real documents stay below 0.1 %.
MAX_CONTROL = 0.002

#: Bits a byte. English prose has 4.1 to 4.6, code 4.3 to 5; a ruler of two characters at most 1.
MIN_ENTROPY = 2.5

#: Compressed share of a text of at least so many bytes. Prose keeps 0.35 to 0.6, tables of numbers
#: 0.2, a sentence that is repeated thirty times 0.03.
MIN_COMPRESSED = 0.06
LONG = 1000


def noise(text: str) -> str | None:
    """A reason such as "control characters: 31 of 900", or None."""
    # All of CONTROL but the C0 range is outside ASCII; most texts are printable ASCII.
    controls = len(CONTROL.findall(text))
    if controls > MAX_CONTROL * len(text):
        return f"control characters: {controls:,} of {len(text):,}"
    data = text.encode("utf-8", "surrogatepass")
    if not data:
        return None
    bits = entropy(data)
    if bits < MIN_ENTROPY:
        return f"low entropy: {bits:.1f} bits a byte, less than {MIN_ENTROPY}"
    if len(data) >= LONG:
        share = len(zlib.compress(data, 1)) / len(data)
        if share < MIN_COMPRESSED:
            return f"low entropy: compresses to {share:.1%}, it repeats itself"
    return None


def entropy(data: bytes) -> float:
    """Shannon entropy of the bytes, in bits a byte."""
    import numpy as np

    counts = np.bincount(np.frombuffer(data, dtype=np.uint8))
    counts = counts[counts > 0]
    return math.log2(len(data)) - float((counts * np.log2(counts)).sum()) / len(data)
