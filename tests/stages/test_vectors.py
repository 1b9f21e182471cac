"""Vectors: one a chunk, the same bytes cold or warm, damaged chunks refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import InputError
from contracts.settings import Settings
from resources.embedding import Embedder
from stages import vectors
from stages.tables import write_table
from tests.stages.knowledge import PAGES, params, paths, write_chunks


def test_cold_warm_and_grown_caches_give_the_same_bytes(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks, out = write_chunks(tmp_path), tmp_path / "vectors.parquet"
    metrics = vectors.run(paths(chunks=chunks, out=out), params())
    cold = out.read_bytes()
    assert metrics == {"vectors": 6, "dimension": 384}
    assert "6 computed" in capsys.readouterr().out

    assert vectors.run(paths(chunks=chunks, out=out), params()) == metrics
    assert out.read_bytes() == cold
    assert "0 computed" in capsys.readouterr().out

    # Another history: first the half, then all of it, in other batches.
    for item in settings.embeddings_dir.iterdir():
        item.unlink()
    half = write_chunks(tmp_path / "half", {"bread.md": PAGES["bread.md"]})
    vectors.run(paths(chunks=half, out=tmp_path / "half.parquet"), params())
    vectors.run(paths(chunks=chunks, out=out), params(vectors={"batch": 2}))
    assert out.read_bytes() == cold
    assert "5 computed" in capsys.readouterr().out


def test_rows_pair_with_chunks_and_name_their_model(settings: Settings, tmp_path: Path) -> None:
    chunks, out = write_chunks(tmp_path), tmp_path / "vectors.parquet"
    vectors.run(paths(chunks=chunks, out=out), params())
    ids, values, model = vectors.read_vectors(out)
    table = pq.read_table(chunks)
    assert ids == table["chunk_id"].to_pylist()
    assert pq.read_table(out)["text_sha"].to_pylist() == table["text_sha"].to_pylist()
    embedder = Embedder()
    assert model == embedder.describe()
    texts = [vectors.embedded_text(row, embedder) for row in table.to_pylist()]
    assert (values == embedder.embed(texts)).all()
    assert np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-6)


def test_headings_are_embedded_where_the_model_has_room() -> None:
    embedder = Embedder()
    row = {"title": "Gates", "heading": "Gates > Floors", "text": "A floor.", "tokens": 3}
    assert vectors.embedded_text(row, embedder) == "Gates > Floors\nA floor."
    assert vectors.embedded_text({**row, "heading": "Args"}, embedder) == "Gates: Args\nA floor."
    assert vectors.embedded_text({**row, "heading": ""}, embedder) == "Gates\nA floor."
    full = {**row, "heading": "long word " * 100, "tokens": 128}
    assert vectors.embedded_text(full, embedder) == "A floor."
    assert vectors.embedded_text({**row, "tokens": 254}, embedder) == "A floor."


def test_damaged_chunks_are_refused(settings: Settings, tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path)
    table = pq.read_table(chunks)
    texts = table["text"].to_pylist()
    texts[2] += " tampered"
    column = table.schema.get_field_index("text")
    write_table(chunks, table.set_column(column, "text", pa.array(texts)))
    with pytest.raises(InputError, match="1 texts do not match their hash") as caught:
        vectors.run(paths(chunks=chunks, out=tmp_path / "v.parquet"), params())
    assert caught.value.offenders == [table["chunk_id"][2].as_py()]
    write_table(chunks, table.slice(0, 0))
    with pytest.raises(InputError, match="0 rows"):
        vectors.run(paths(chunks=chunks, out=tmp_path / "v.parquet"), params())
    write_table(chunks, table.drop_columns(["text"]))
    with pytest.raises(InputError, match="lacks columns") as caught:
        vectors.run(paths(chunks=chunks, out=tmp_path / "v.parquet"), params())
    assert caught.value.offenders == ["text"]
    with pytest.raises(InputError, match="does not exist"):
        vectors.run(paths(chunks=tmp_path / "no", out=tmp_path / "v.parquet"), params())


def test_a_file_without_its_model_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "v.parquet", pa.table({"chunk_id": ["a"], "vector": [[1.0]]}))
    with pytest.raises(InputError, match="which model"):
        vectors.read_vectors(tmp_path / "v.parquet")


def test_progress_tells_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    report = vectors.progress_lines(time.monotonic() - 10, every=0)
    report(50, 150)
    line = capsys.readouterr().out
    assert line.startswith("embedded 50/150 new texts, 5/s, 20 s left")
