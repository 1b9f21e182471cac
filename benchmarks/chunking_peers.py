"""Other people's splitters, run as a process of their own in whatever environment holds them.

In (JSON on standard input): ``{"splitter", "tokenizer": path, "limit", "texts"}``. Out (JSON on
standard output): ``{"spans": [[[start, end], …], …], "seconds"}``; seconds are CPU seconds of
splitting alone. Needs nothing of this project; one thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Spans = list[tuple[int, int]]


def langchain(tokenizer: Any, limit: int) -> Callable[[str], Spans]:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(
        chunk_size=limit,
        chunk_overlap=0,
        length_function=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        add_start_index=True,
    )

    def split(text: str) -> Spans:
        found = splitter.create_documents([text])
        starts = [(one.metadata["start_index"], len(one.page_content)) for one in found]
        return [(start, start + length) for start, length in starts]

    return split


def chonkie(tokenizer: Any, limit: int) -> Callable[[str], Spans]:
    from chonkie import RecursiveChunker  # type: ignore[import-not-found]

    chunker = RecursiveChunker(tokenizer=tokenizer, chunk_size=limit)
    return lambda text: [(one.start_index, one.end_index) for one in chunker.chunk(text)]


def semantic_text(tokenizer: Any, limit: int) -> Callable[[str], Spans]:
    from semantic_text_splitter import TextSplitter  # type: ignore[import-not-found]

    splitter = TextSplitter.from_huggingface_tokenizer(tokenizer, limit)
    return lambda text: [(at, at + len(part)) for at, part in splitter.chunk_indices(text)]


SPLITTERS = {
    "langchain recursive": langchain,
    "chonkie recursive": chonkie,
    "semantic-text-splitter": semantic_text,
}


def main() -> None:
    from tokenizers import Tokenizer

    job = json.load(sys.stdin)
    tokenizer = Tokenizer.from_file(job["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    split = SPLITTERS[job["splitter"]](tokenizer, job["limit"])
    clock = time.process_time()
    spans = [split(text) for text in job["texts"]]
    print(json.dumps({"spans": spans, "seconds": time.process_time() - clock}))


if __name__ == "__main__":
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    main()
