"""The stage chunks: the same bytes from the cache, from processes and from Ray."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InputError
from contracts.params import Params
from contracts.records import Chunk, Document, Heading
from resources.content_cache import ContentCache
from stages import chunks, splitting
from stages.splitting.work import Recipe
from tests.stages.knowledge import params, paths

RECIPE = Recipe("all-MiniLM-L6-v2", 64, "structure")


def document(number: int, **fields: Any) -> Document:
    given: dict[str, Any] = {
        "doc_id": f"docs:{number}",
        "source": "docs",
        "path": f"{number}.md",
        "title": f"T{number}",
        "md5": "0" * 32,
        "text": f"# Page {number}\n\n" + f"It says {number} things. Then it ends. " * 40,
        "format": "markdown",
        "language": "en",
        "licence": "MIT",
    }
    return Document.model_validate({**given, **fields})


def write(folder: Path, documents: list[Document]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.document_table import schema

    columns = [field for field in schema() if field.name != "problem"]
    table = pa.Table.from_pylist([one.model_dump() for one in documents], pa.schema(columns))
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "documents.parquet")
    return folder


def knobs(**changed: Any) -> Params:
    return params(chunks=changed)


def build(folder: Path, documents: list[Document], name: str, settings: Params) -> bytes:
    out = folder / name
    chunks.run(paths(documents=write(folder / "quality", documents), out=out), settings)
    return out.read_bytes()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test: its caches begin empty."""
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def test_rows_hold_what_the_document_says(tmp_path: Path, state: Path) -> None:
    import pyarrow.parquet as pq

    text = "Top\n===\n\nWords.\n\nBelow\n-----\n\nMore words.\n"
    headings = [Heading(level=1, title="Top", start=0), Heading(level=2, title="Below", start=17)]
    pages = [
        document(1),
        document(2, text=text, format="rst", licence=None, headings=headings),
    ]
    build(tmp_path, pages, "chunks.parquet", knobs())
    rows = pq.read_table(tmp_path / "chunks.parquet").to_pylist()
    assert list(rows[0]) == list(Chunk.model_fields)
    found = [Chunk.model_validate(row) for row in rows]
    by_id = {page.doc_id: page for page in pages}
    for chunk in found:
        page = by_id[chunk.doc_id]
        assert chunk.text == page.text[chunk.start : chunk.end]
        assert (chunk.format, chunk.licence) == (page.format, page.licence)
    assert [chunk.heading for chunk in found if chunk.format == "rst"] == ["Top", "Top > Below"]


def test_only_changed_documents_are_split_and_bytes_are_the_same(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pages = [document(number) for number in range(20)]
    cold = build(tmp_path, pages, "a", knobs())
    assert "(20 new)" in capsys.readouterr().out
    assert build(tmp_path, pages, "b", knobs()) == cold
    assert "(0 new)" in capsys.readouterr().out
    pages[7] = document(7, text=pages[7].text + "One more.")
    warm = build(tmp_path, pages, "c", knobs())
    assert "(1 new)" in capsys.readouterr().out
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "empty"))
    assert build(tmp_path, pages, "d", knobs()) == warm != cold


def test_a_new_title_needs_no_new_split_and_is_in_the_rows(
    tmp_path: Path, state: Path, capsys: Any
) -> None:
    import pyarrow.parquet as pq

    build(tmp_path, [document(1)], "a", knobs())
    build(tmp_path, [document(1, title="Other")], "b", knobs())
    assert "(0 new)" in capsys.readouterr().out
    assert set(pq.read_table(tmp_path / "b")["title"].to_pylist()) == {"Other"}


def test_the_key_holds_all_that_spans_follow_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = chunks.recipe_digest(RECIPE)
    others = [Recipe(RECIPE.model, 65, "structure"), Recipe(RECIPE.model, 64, "code")]
    assert len({base, *map(chunks.recipe_digest, others)}) == 3
    code = tmp_path / "splitting"
    code.mkdir()
    for path in Path(splitting.__file__).parent.glob("*.py"):
        (code / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(splitting, "__file__", str(code / "__init__.py"))
    assert chunks.recipe_digest(RECIPE) == base
    (code / "cuts.py").write_text("# other code\n")
    assert chunks.recipe_digest(RECIPE) != base
    headings = [Heading(level=1, title="A", start=0)]
    changed = [{}, {"text": "x"}, {"format": "rst"}, {"language": "de"}, {"headings": headings}]
    keys = {chunks.document_key(document(1, **one), base) for one in changed}
    assert len(keys) == len(changed)


def test_a_damaged_cache_entry_is_split_again(tmp_path: Path, state: Path, capsys: Any) -> None:
    pages = [document(number) for number in range(5)]
    cold = build(tmp_path, pages, "a", knobs())
    with sqlite3.connect(state / "caches" / "chunks.sqlite") as db:
        db.execute("UPDATE entries SET value = x'00' WHERE sha = (SELECT min(sha) FROM entries)")
    capsys.readouterr()
    assert build(tmp_path, pages, "b", knobs()) == cold
    assert "(1 new)" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BATCH", 1)  # a document a batch
    pages = [document(number) for number in range(6)]
    cache = ContentCache(tmp_path / "cache.sqlite")
    real, done = chunks.split_batch, 0

    def killed_at_the_fourth(recipe: Recipe, items: list[Any]) -> list[bytes]:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return real(recipe, items)

    monkeypatch.setattr(chunks, "split_batch", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        chunks.find_spans(pages, RECIPE, cache, "local")
    assert len(cache) == 3
    monkeypatch.setattr(chunks, "split_batch", real)
    assert chunks.find_spans(pages, RECIPE, cache, "local")[1] == 3
    cache.close()


def test_several_processes_give_the_same_bytes(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [document(number) for number in range(12)]
    one = build(tmp_path, pages, "a", knobs())
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(chunks, "PER_PROCESS", 100)
    monkeypatch.setattr(chunks, "BATCH", 3000)
    assert build(tmp_path, pages, "b", knobs()) == one


def test_documents_without_text_are_refused(tmp_path: Path, state: Path) -> None:
    with pytest.raises(InputError, match="No document holds any text"):
        build(tmp_path, [document(1, text=" \n")], "a", knobs())
