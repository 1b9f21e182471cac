"""Vectors: one a chunk, the same bytes cold or warm, damaged chunks refused."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from contracts.errors import InputError
from contracts.params import Vectors
from contracts.settings import ROOT, Settings
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


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(settings: Settings, tmp_path: Path) -> None:
    """SIGKILL in the middle: what was embedded stays so, and the output is as if never killed."""
    pages = {
        f"page{n}.md": f"# Page {n}\n\n" + f"Sentence {n} says something of its own. " * 18
        for n in range(90)
    }
    chunks, out = write_chunks(tmp_path, pages), tmp_path / "vectors.parquet"
    knobs = yaml.safe_load((ROOT / "params.yaml").read_text())
    knobs["vectors"]["batch"] = 2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(knobs))
    command = [sys.executable, "-m", "stages.vectors", "--chunks", str(chunks), "--out", str(out)]
    command += ["--params", str(tmp_path / "params.yaml")]
    environ = {**os.environ, "RATCHET_TRACKING": "off", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while rows_in(settings.embeddings_dir) < 6:
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.communicate()
    saved = rows_in(settings.embeddings_dir)
    total = pq.read_metadata(chunks).num_rows
    assert 6 <= saved < total and not out.exists()

    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert f"{total} vectors: {total - saved} computed" in done.stdout
    whole = tmp_path / "whole.parquet"
    for item in settings.embeddings_dir.iterdir():
        item.unlink()
    vectors.run(paths(chunks=chunks, out=whole), params())
    assert out.read_bytes() == whole.read_bytes()


def rows_in(folder: Path) -> int:
    """Entries of the only cache below ``folder``, as another process sees them; 0 before it is."""
    for path in folder.glob("*.sqlite"):
        with (
            contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
            contextlib.suppress(sqlite3.OperationalError),
        ):
            return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])
    return 0


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "openai"}, "needs a dimension"),
        ({"backend": "openai", "dimension": 8, "engine": "ray"}, "computes on its server"),
        ({"backend": "openai", "dimension": 8, "device": "cuda"}, "computes on its server"),
        ({"dimension": 8}, "belong to backend openai"),
        ({"tokenizer": "all-MiniLM-L6-v2"}, "belong to backend openai"),
        ({"device": "cuda", "engine": "ray"}, "nodes' CPUs"),
        ({"dtype": "float16"}, "needs device cuda"),
    ],
)
def test_params_that_contradict_each_other_are_refused(
    change: dict[str, Any], message: str
) -> None:
    block = {"model": "all-MiniLM-L6-v2", "batch": 64, "dtype": "bfloat16"}
    assert Vectors.model_validate(block).backend == "torch"
    with pytest.raises(ValidationError, match=message):
        Vectors.model_validate({**block, **change})


def test_a_cpu_without_bfloat16_is_told_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    low = params(vectors={"dtype": "bfloat16"})
    monkeypatch.setattr(vectors, "cpu_flags", lambda: ["avx512f", "avx2"])
    assert "vectors.dtype: float32" in vectors.dtype_note(low)
    assert vectors.dtype_note(params(vectors={"dtype": "float32"})) == ""
    for flag in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(vectors, "cpu_flags", lambda flag=flag: [flag, "avx2"])
        assert vectors.dtype_note(low) == ""


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
