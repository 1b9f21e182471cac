"""A tiny knowledge base for the tests of the stages vectors, index and retrieval."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contracts.params import Params, load_params
from contracts.records import Document
from resources.embedding import find_model, load_tokenizer
from stages import chunks
from stages.splitting import WordCounter
from stages.tables import write_rows

PAGES = {
    "gates.md": (
        "# Gates\n\nA gate decides whether a candidate may be released.\n\n"
        "## Verdicts\n\nThe verdict is PASS, FAIL or INVALID. A missing score is INVALID.\n\n"
        "## Floors\n\nA floor is the least value that a metric may have.\n"
    ),
    "rollback.md": (
        "# Rollback\n\nRolling back points the channel at the previous release.\n\n"
        "## How long it takes\n\nA rollback takes less than a second, because the old engine\n"
        "keeps running until the new one has answered a health check.\n"
    ),
    "bread.md": "# Bread\n\nKnead the dough for ten minutes, then let it rise in a warm place.\n",
}


def params(**blocks: dict[str, Any]) -> Params:
    """params.yaml of the repository with some keys of some blocks replaced."""
    base = load_params(Path(__file__).parents[2] / "params.yaml")
    changed = {name: getattr(base, name).model_copy(update=new) for name, new in blocks.items()}
    return base.model_copy(update=changed)


def write_chunks(folder: Path, pages: dict[str, str] = PAGES) -> Path:
    """``chunks.parquet`` of those pages, cut by the real stage's own function."""
    counter = WordCounter(load_tokenizer(find_model("all-MiniLM-L6-v2")))
    rows = []
    for path, text in pages.items():
        document = Document(
            doc_id=f"docs:{path}",
            source="docs",
            path=path,
            title=path.split(".")[0].title(),
            md5="0" * 32,
            text=text,
            git_path=f"docs/{path}",
            format="markdown",
        )
        rows += list(chunks.chunk_rows(document, 128, counter))
    write_rows(folder / "chunks.parquet", rows, chunks.schema())
    return folder / "chunks.parquet"


def paths(**options: Path) -> SimpleNamespace:
    return SimpleNamespace(**options)
