"""Documents: every file becomes a row, whatever is in it; docstrings come without an import."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from contracts.errors import ConfigError, InputError
from contracts.params import Params, Source, load_params
from contracts.records import Document
from stages import documents
from stages.docstrings import docstrings, package_folder
from stages.document_table import document_row

ROOT = Path(__file__).parents[2]


def params_with(**sources: Source) -> Params:
    base = load_params(ROOT / "params.yaml")
    changed = base.documents.model_copy(update={"sources": sources})
    return base.model_copy(update={"documents": changed})


def run(tmp_path: Path, key: str, source: Source) -> list[dict[str, Any]]:
    out = tmp_path / f"{key}.parquet"
    documents.run(SimpleNamespace(key=key, out=out), params_with(**{key: source}))
    return pq.read_table(out).to_pylist()


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `docs`, with the working directory above it, as in the repository."""
    monkeypatch.chdir(tmp_path)
    folder = Path("docs")
    (folder / "deep").mkdir(parents=True)
    (folder / "gates.md").write_text("# The *gate*\n\nIt judges.  \n")
    (folder / "deep" / "plain.md").write_bytes(b"no heading here\r\n")
    return folder


def test_a_folder_becomes_document_rows(guide: Path, tmp_path: Path) -> None:
    for skipped in (".hidden/a.md", "decisions/b.md", "notes.txt", ".c.md"):
        (guide / skipped).parent.mkdir(exist_ok=True)
        (guide / skipped).write_text("# Not for the knowledge base")
    source = Source(
        uri="docs", path="docs", include=["**/*.md"], exclude=["decisions/**"], licence="MIT"
    )
    rows = run(tmp_path, "docs", source)
    assert [row.pop("problem") for row in rows] == [None, None]
    plain, gates = [Document.model_validate(row) for row in rows]
    assert gates.doc_id == "docs:gates.md" and gates.git_path == "docs/gates.md"
    assert gates.title == "The *gate*" and plain.title == "plain"
    assert [dict(item) for item in gates.headings] == [
        {"level": 1, "title": "The *gate*", "start": 0}
    ]
    assert plain.path == "deep/plain.md" and plain.text == "no heading here\r\n"  # byte for byte
    for row in (plain, gates):
        data = (guide / row.path).read_bytes()
        assert row.md5 == hashlib.md5(data).hexdigest() and row.text.encode() == data
        assert (row.format, row.language, row.licence) == ("markdown", "", "MIT")  # too short


def test_two_runs_give_the_same_bytes(guide: Path, tmp_path: Path) -> None:
    source = Source(uri="docs", path="docs")
    run(tmp_path, "docs", source)
    first = (tmp_path / "docs.parquet").read_bytes()
    run(tmp_path, "docs", source)
    assert (tmp_path / "docs.parquet").read_bytes() == first


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate((16 << 20) + 1)


def _escape(path: Path) -> None:
    Path("secret.md").write_text("# Secret")
    path.symlink_to("../secret.md")


def _loop(path: Path) -> None:
    path.symlink_to(path)


BAD = {
    "binary": (lambda path: path.write_bytes(b"# A\0\xff\xfe" * 50), "binary: holds NUL bytes"),
    "latin": (lambda path: path.write_bytes("# Größe".encode("latin-1")), "not UTF-8: byte 4"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "blank": (lambda path: path.write_text(" \n\t\n"), "empty"),
    "huge": (_huge, "more than the limit of 16,777,216"),
    "escape": (_escape, "a link that leads out of the folder"),
    "broken": (lambda path: path.symlink_to("nowhere.md"), "not a regular file, or a broken link"),
    "loop": (_loop, ""),
    "pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "folder": (lambda path: path.mkdir(), None),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_flagged_and_the_run_goes_on(
    kind: str, guide: Path, tmp_path: Path
) -> None:
    make, reason = BAD[kind]
    make(guide / "bad.md")
    rows = {row["path"]: row for row in run(tmp_path, "docs", Source(uri="docs", path="docs"))}
    assert rows["gates.md"]["problem"] is None and rows["deep/plain.md"]["problem"] is None
    if reason is None:  # a folder of that name is no document
        assert "bad.md" not in rows
        return
    bad = rows["bad.md"]
    assert bad["problem"] and reason in bad["problem"]
    assert bad["text"] == "" and bad["doc_id"] == "docs:bad.md"
    if kind in ("binary", "latin", "empty", "blank", "huge"):
        assert bad["md5"] == hashlib.md5((guide / "bad.md").read_bytes()).hexdigest()
    assert "Secret" not in str(bad)


def test_a_file_name_that_is_not_utf8_is_written_out(guide: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(str(guide)) + b"/caf\xe9.md")).write_text("# Coffee\n")
    rows = run(tmp_path, "docs", Source(uri="docs", path="docs"))
    assert "caf\\xe9.md" in [row["path"] for row in rows]


def test_a_linked_folder_is_not_entered(guide: Path, tmp_path: Path) -> None:
    (guide / "again").symlink_to(guide.resolve())
    rows = run(tmp_path, "docs", Source(uri="docs", path="docs"))
    assert len(rows) == 2


def test_paths_are_made_distinct_in_linear_time() -> None:
    names = ["a.md"] * 20_000 + ["a.md (2)", "a.md (3)", "b.md"]
    rows = documents.distinct([document_row("s", name, text="x") for name in names])
    paths = [row["path"] for row in rows]
    assert paths == sorted(set(paths)) and len(paths) == len(names)
    assert [row["path"] for row in rows if not row["problem"]] == sorted(set(names))


def test_unknown_keys_and_folders_say_the_next_step(guide: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'docs'"):
        documents.find_source("dosc", params_with(docs=Source(uri="docs", path="docs")))
    with pytest.raises(InputError, match="does not exist"):
        run(tmp_path, "docs", Source(uri="dcos", path="docs"))
    Path("none").mkdir()
    with pytest.raises(InputError, match="holds no document"):
        run(tmp_path, "docs", Source(uri="none", path="none"))


PACKAGE = {
    "__init__.py": '"""{long} package."""\nfrom pkg._core.thing import Thing as Thing\n',
    "_core/__init__.py": "",
    "_core/thing.py": '''
class Thing:
    """{long} class.

    Outer line.
        Indented line.
    """
    def go(self):
        """{long} method."""
        def inner():
            """{long} inner function, not an API."""
    def _private(self):
        """{long} private."""
    def short(self):
        """Too short."""

try:
    def guarded():
        """{long} guarded function."""
except ImportError:
    pass
raise RuntimeError("importing this would fail")
''',
    "template.py": "def {{ name }}(:\n",
    "tests/test_a.py": '"""{long} test module."""',
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    long = "A text with quite enough words to say something of substance about the"
    for name, text in PACKAGE.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("{long}", long))
    return tmp_path / "pkg"


def test_docstrings_are_found_without_an_import(package: Path) -> None:
    found = dict(docstrings("pkg", package))
    assert sorted(found) == ["pkg", "pkg.Thing", "pkg.Thing.go", "pkg._core.thing.guarded"]
    assert found["pkg.Thing"].endswith("the class.\n\nOuter line.\n    Indented line.")


def test_the_installed_version_must_be_the_locked_one(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text(f"dagster-webserver==0.1\ndagster=={version('dagster')} \\\n    --hash=x\n")
    assert (package_folder("dagster", lock) / "__init__.py").is_file()
    lock.write_text("dagster==0.0.1 \\\n    --hash=x\n")
    with pytest.raises(InputError, match=r"the lock file pins 0\.0\.1") as caught:
        package_folder("dagster", lock)
    assert str(lock) in str(caught.value) and "next:" in str(caught.value)
    lock.write_text(f"dagster-webserver=={version('dagster')}\n")
    with pytest.raises(InputError, match="does not pin it"):
        package_folder("dagster", lock)
    with pytest.raises(InputError, match="cannot be read"):
        package_folder("dagster", tmp_path / "absent.lock")
    for name in ("no_such_package", "no_such.package", "", "os.path"):
        with pytest.raises(ConfigError, match="not installed"):
            package_folder(name, lock)
    lock.write_text(f"pyyaml=={version('pyyaml')}\n")
    assert package_folder("yaml", lock).name == "yaml"  # another name than its distribution


def test_the_command_reports_a_bad_key_in_one_message(tmp_path: Path) -> None:
    """The real process, params.yaml and lock of the repository."""
    command = [sys.executable, "-m", "stages.documents", "--key", "dagstr", "--out"]
    result = subprocess.run(
        [*command, str(tmp_path / "x.parquet")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RATCHET_TRACKING": "off"},
    )
    assert result.returncode == 2
    assert "Did you mean 'dagster'?" in result.stderr and "Traceback" not in result.stderr
