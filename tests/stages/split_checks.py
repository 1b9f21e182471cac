"""What must hold of every split, whatever the text, strategy and format."""

from __future__ import annotations

from collections.abc import Sequence

from contracts.records import Heading
from resources.embedding import find_model, load_tokenizer
from stages.splitting import Span, Strategy, WordCounter, split

COUNTER = WordCounter(load_tokenizer(find_model("all-MiniLM-L6-v2")))


def check(
    text: str,
    limit: int,
    *,
    format: str,
    strategy: Strategy = "structure",
    language: str = "",
    headings: Sequence[Heading] = (),
) -> list[str]:
    """Every invariant of a split; returns the pieces."""

    def spans() -> list[Span]:
        return split(
            text,
            limit,
            COUNTER,
            format=format,
            strategy=strategy,
            language=language,
            headings=headings,
        )

    found = spans()
    previous = 0
    for span in found:
        piece = text[span.start : span.end]
        ids = COUNTER.tokenizer.encode(piece, add_special_tokens=False).ids
        assert span.tokens == len(ids) <= limit
        assert span.start >= previous, "spans overlap, or one lies in its neighbour"
        assert span.end > span.start
        assert not text[previous : span.start].strip(), "a non-space character was lost"
        assert piece == piece.strip(" \t\r\n")
        previous = span.end
    assert not text[previous:].strip(), "the end was lost"
    assert found == spans(), "a re-run differs"
    return [text[span.start : span.end] for span in found]
