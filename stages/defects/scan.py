"""scan: everything that one text's bytes say about it, remembered by their hash.

In: texts, the texts that must not stand in them. Out: a :class:`Finding` for each. A finding
follows from the text, the protected texts and the code here alone, and no threshold of the policy
is in it; so an edit of one document of 10,000 scans one, and a change of params scans none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import text_sha
from resources.content_cache import ContentCache
from resources.recognisers.pii import find_pii
from resources.recognisers.secrets import find_secrets
from resources.recognisers.spans import Found, without_overlap
from stages.defects import near_duplicates
from stages.defects.boilerplate import Lines, read_lines
from stages.defects.mojibake import mojibake
from stages.defects.noise import noise
from stages.defects.words import word_hashes
from stages.leakage import Leak, Protected

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 1000  # texts a commit: a killed run loses no more


@dataclass(frozen=True)
class Finding:
    mojibake: str | None
    noise: str | None
    spans: list[Found]  # personal data and secrets
    leaks: list[Leak]
    lines: Lines
    signature: NDArray[Any]


def scan(text: str, protected: Protected) -> Finding:
    """The finding of one text."""
    words = word_hashes(text)
    return Finding(
        mojibake=mojibake(text),
        noise=noise(text),
        spans=without_overlap(find_secrets(text) + find_pii(text)),
        leaks=protected.leaks(text, words),
        lines=read_lines(text),
        signature=near_duplicates.signature(near_duplicates.shingles_of(words)),
    )


def scan_all(
    texts: Sequence[str], protected: Mapping[str, str], folder: Path
) -> tuple[list[Finding], int]:
    """(the finding of each text, how many were not remembered); the cache is in ``folder``."""
    recipe = code_digest() + text_sha(json.dumps(protected, sort_keys=True))
    keys = [text_sha(recipe + text_sha(text)) for text in texts]
    cache = ContentCache(folder / "quality-findings.db")
    try:
        stored = cache.get(sorted(set(keys)))
        found = {key: unpack(value) for key, value in stored.items()}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        index = Protected(protected)
        todo = list(missing)
        for start in range(0, len(todo), BATCH):
            part = {key: scan(missing[key], index) for key in todo[start : start + BATCH]}
            cache.put({key: pack(finding) for key, finding in part.items()})
            found |= part
    finally:
        cache.close()
    return [found[key] for key in keys], len(missing)


def code_digest() -> str:
    """Hash of the code that a finding comes from, and of the libraries that it calls."""
    here = Path(__file__).parent
    recognisers = here.parent.parent / "resources" / "recognisers"
    digest = hashlib.sha256()
    own = [*sorted(here.glob("*.py")), *sorted(recognisers.glob("*.py"))]
    for file in [*own, here.parent / "leakage.py"]:
        digest.update(file.read_bytes())
    for name in ("ftfy", "datasketch", "numpy"):
        digest.update(f"{name}{version(name)}".encode())
    return digest.hexdigest()


def pack(finding: Finding) -> bytes:
    """One finding as bytes: the length of its JSON, the JSON, the arrays."""
    head = {
        "mojibake": finding.mojibake,
        "noise": finding.noise,
        "spans": [[span.kind, span.start, span.end] for span in finding.spans],
        "leaks": [asdict(leak) for leak in finding.leaks],
        "total": finding.lines.total,
        "lines": len(finding.lines.hashes),
    }
    data = json.dumps(head, ensure_ascii=False).encode("utf-8", "surrogatepass")
    arrays = (finding.lines.hashes, finding.lines.lengths, finding.signature)
    return len(data).to_bytes(4, "little") + data + b"".join(item.tobytes() for item in arrays)


def unpack(data: bytes) -> Finding:
    """The finding that :func:`pack` wrote."""
    import numpy as np

    start = 4 + int.from_bytes(data[:4], "little")
    head = json.loads(data[4:start].decode("utf-8", "surrogatepass"))
    count = head["lines"]
    lines = Lines(
        np.frombuffer(data, np.uint64, count, start),
        np.frombuffer(data, np.uint32, count, start + 8 * count),
        head["total"],
    )
    return Finding(
        mojibake=head["mojibake"],
        noise=head["noise"],
        spans=[Found(*span) for span in head["spans"]],
        leaks=[Leak(**leak) for leak in head["leaks"]],
        lines=lines,
        signature=np.frombuffer(data, np.uint32, offset=start + 12 * count),
    )
