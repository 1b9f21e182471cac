"""The training text: what is read, what is kept out, and that another text is refused."""

from pathlib import Path

import pytest

from contracts.errors import ConfigError
from stages.nano import build, corpus
from tests.stages import nano_models

PROSE = "The cache keeps what was computed before, so that nothing is computed twice. "


def test_docstrings_become_sections(tmp_path: Path) -> None:
    path = tmp_path / "pkg" / "mod.py"
    path.parent.mkdir()
    path.write_text(
        f'"""{PROSE * 4}"""\n\ndef f():\n    """{PROSE * 3}"""\n\ndef g():\n    """No."""\n'
    )
    text = corpus.read_module(path, tmp_path)
    assert text.title == "pkg.mod"
    assert [section.heading for section in text.sections] == ["pkg.mod", "f"]
    assert text.sections[1].text == (PROSE * 3).strip()


def test_markdown_becomes_sections() -> None:
    body = f"---\nname: x\n---\n# One\n\n{PROSE * 3}\n\nTwo\n===\n\n{PROSE * 3}\n"
    body += "\n## Code\n\n{}()=;\n"
    text = corpus.read_markdown("guide", body)
    assert [section.heading for section in text.sections] == ["One", "Two"]


def test_what_the_model_is_examined_on_stays_out() -> None:
    assert corpus.read_markdown("a", f"# One\n{PROSE * 3} Dagster runs it.").sections == ()
    assert not {"dagster", "dagster_dvc", "docs"} & set(corpus.PACKAGES)
    assert not any("dagster" in name for name in corpus.READMES)


def test_unparsable_files_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_bytes(b"\x00def (")
    assert corpus.read_module(path, tmp_path).sections == ()


def test_collect_reads_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b", "a", "tests/c"):
        path = tmp_path / "click" / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f'"""{PROSE * 3} {name[0] * (name != "b")}"""\n')
    (tmp_path / "click" / "copy.py").write_text(f'"""{PROSE * 3}"""\n')
    readme = tmp_path / "aiohttp-1.0.dist-info"
    readme.mkdir()
    (readme / "METADATA").write_text(f"Name: aiohttp\n\n# Start\n\nHere it is: {PROSE * 3}\n")
    texts = corpus.collect(tmp_path)
    assert [text.title for text in texts] == [
        "click.a",
        "aiohttp",
    ]  # the others repeat or are tests
    assert corpus.digest(texts) != corpus.digest(texts[::-1])


def test_another_corpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = nano_models.texts()
    monkeypatch.setattr(corpus, "collect", lambda: texts)
    found = corpus.digest(texts)
    said: list[str] = []
    assert build.checked_corpus(nano_models.knobs(corpus_md5=found), said.append) == texts
    assert found in said[0]
    with pytest.raises(ConfigError) as error:
        build.checked_corpus(nano_models.knobs(corpus_md5="0" * 32), said.append)
    assert found in str(error.value)
    assert "base_model.nano.corpus_md5" in str(error.value)


def test_shapes_that_the_circuit_does_not_fit_are_refused() -> None:
    build.check(nano_models.knobs())
    with pytest.raises(ConfigError) as error:
        build.check(nano_models.knobs(hidden=256, heads=3))
    assert len(error.value.offenders) == 2
