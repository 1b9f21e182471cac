"""``engine: ray``: the same rows, byte for byte, as the local engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.sources import docx_bytes, pdf_bytes, read


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.md").write_text(f"# Title {number}\n\nText number {number}.\n")
        (folder / f"{number}.html").write_text(f"<h1>Page {number}</h1><p>Words.</p>")
    (folder / "a.pdf").write_bytes(pdf_bytes("A page of words, written for every engine alike."))
    (folder / "b.docx").write_bytes(docx_bytes())
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7")
    written = []
    for engine in ("local", "ray"):
        monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / engine))  # a cache of its own
        rows = read(tmp_path, str(folder), block={"engine": engine})
        assert len(rows) == 603 and list(rows.problems()) == ["bad.pdf"]
        written.append((tmp_path / "out" / "s.parquet").read_bytes())
    assert written[0] == written[1]
