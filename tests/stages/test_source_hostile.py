"""Hostile input: each file becomes a row with its reason, and the files beside it are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from stages.sources import sandbox
from stages.sources.containers import is_container, members
from stages.sources.files import Limits, Selection, shown
from stages.sources.folder import local_files
from stages.sources.parse import parse_batch
from tests.stages.sources import Rows, docx_bytes, pdf_bytes, read, zip_bytes

GOOD = b"# Good\n\nThis file lies beside the bad one and is read.\n"
ZEROS = bytes(5 << 20)
MEBI = bytes(1 << 20)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.md").write_bytes(GOOD)
    return tmp_path / "in"


def read_beside_good(tmp_path: Path, **arguments: object) -> Rows:
    rows = read(tmp_path, "in", **arguments)  # type: ignore[arg-type]
    assert rows.text("good.md").encode() == GOOD
    return rows


def image_only_pdf() -> bytes:
    return pdf_bytes("", "")


def bomb_docx() -> bytes:
    return zip_bytes({"[Content_Types].xml": b"<a/>", "word/document.xml": ZEROS})


def lying_zip() -> bytes:
    """A ZIP whose directory says 10 bytes for a member of five million."""
    data = bytearray(zip_bytes({"a.md": ZEROS}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(mark) + offset, 10)
    return bytes(data)


BAD = {
    "cut.pdf": (pdf_bytes("A text of one page.")[:600], "truncated: no %%EOF at its end"),
    "not.pdf": (b"# Markdown\n", "not a PDF"),
    "locked.pdf": (pdf_bytes("Secret.", password="x"), "encrypted: it asks for a password"),
    "scan.pdf": (image_only_pdf(), "no text on its 2 pages: images only"),
    "junk.pdf": (b"%PDF-1.7\n" + b"\x01\x02" * 900 + b"\n%%EOF", "as pdf"),
    "bomb.docx": (bomb_docx(), "the file unpacks to"),
    "not.docx": (b"words", "not readable as docx: File is not a zip file"),
    "cut.docx": (docx_bytes()[:9000], "not readable as docx"),
    "empty.html": (b"<script>x</script>", "no text in this html file"),
    "deep.html": (b"<div>" * 10_000 + b"x", "not readable as html: nested too deeply"),
    "binary.md": (b"# A\0\xff" * 50, "binary: holds NUL bytes"),
    "latin.md": ("# Größe".encode("latin-1"), "not UTF-8: byte 4"),
    "empty.md": (b"", "empty"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0", "binary: holds NUL bytes"),
    "bomb.zip": (zip_bytes({"a.md": ZEROS}), "times its bytes"),
    "large.zip": (zip_bytes({f"{n}.md": os.urandom(9000) + MEBI for n in range(17)}), "unpacks to"),
    "bomb.tar.gz": (gzip.compress(ZEROS), "times its bytes"),
    "lying.zip": (lying_zip(), "cannot be unpacked: Bad CRC-32"),
    "cut.zip": (zip_bytes({"a.md": GOOD})[:-30], "cannot be read as zip: File is not a zip file"),
    "not.tar": (b"words", "cannot be read as tar"),
}


def test_every_bad_file_is_one_row_with_its_reason(folder: Path, tmp_path: Path) -> None:
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    rows = read_beside_good(tmp_path, block={"max_bytes": 1 << 20})
    assert list(rows) == sorted([*BAD.keys() - {"lying.zip"}, "lying.zip/a.md", "good.md"])
    problems = rows.problems()
    assert len(problems) == len(BAD)
    for name, (data, words) in BAD.items():
        assert words in problems["lying.zip/a.md" if name == "lying.zip" else name], name
        if not is_container(name):
            assert rows[name]["md5"] == hashlib.md5(data).hexdigest()
    assert all(len(reason) < 300 for reason in problems.values())


def test_names_inside_archives(folder: Path, tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name, data in (("./docs/ok.md", GOOD), ("../up.md", b"x"), ("/etc/abs.md", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("passwd.md")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (folder / "a.tgz").write_bytes(tar.getvalue())
    linked = zipfile.ZipInfo("link.md")
    linked.external_attr = 0o120777 << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        zipped.writestr("..\\..\\up.md", "x")
        zipped.writestr(linked, "/etc/passwd")
        zipped.writestr(".hidden/x.md", "x")
        zipped.writestr("inner.zip", zip_bytes({"a.md": GOOD}))
        zipped.writestr("same.md", GOOD)
        with pytest.warns(UserWarning, match="Duplicate name"):
            zipped.writestr("same.md", b"# Another under the same name")
    (folder / "b.zip").write_bytes(stream.getvalue())
    rows = read_beside_good(tmp_path)
    assert rows.text("a.tgz/docs/ok.md") == rows.text("b.zip/same.md") == GOOD.decode()
    assert rows["b.zip/same.md"]["git_path"] is None
    out = "its name leads out of the archive"
    assert rows.problems() == {
        "a.tgz/../up.md": out,
        "a.tgz//etc/abs.md": out,
        "a.tgz/passwd.md": "a link or a device inside an archive",
        "b.zip/..\\\\..\\\\up.md": out,
        "b.zip/inner.zip": "an archive inside an archive",
        "b.zip/link.md": "a link inside an archive",
        "b.zip/same.md (2)": "another document is called b.zip/same.md too",
    }
    assert not list(tmp_path.rglob("up.md"))


def test_limits_on_members_and_on_a_member() -> None:
    def found(data: bytes, limits: Limits) -> list[tuple[str, str | None]]:
        files = members("x.zip", io.BytesIO(data), Selection(), limits)
        return [(file.path, file.problem) for file in files]

    three = zip_bytes({"a.md": b"a", "b.md": b"b" * 11, "c.md": b"c"})
    assert found(three, Limits(max_bytes=10)) == [
        ("a.md", None),
        ("b.md", "11 bytes, more than the limit of 10"),
        ("c.md", None),
    ]
    many = Limits(max_bytes=10, members=2)
    assert found(three, many) == [("x.zip", "the archive has 3 members, over 2")]
    locked = bytearray(zip_bytes({"a.md": b"a"}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(mark) + offset] |= 1
    assert "password required" in str(found(bytes(locked), Limits(10))[0][1])


def test_names_that_do_not_print_and_names_that_look_alike(folder: Path, tmp_path: Path) -> None:
    names = [b"caf\xe9.md", b"two\nlines.md", b"two\\nlines.md", b"Case.md", b"case.md", b"a\tb.md"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(f"# Number {number}\n")
    rows = read_beside_good(tmp_path)
    assert {path: row["text"][9:10] for path, row in rows.items() if path != "good.md"} == {
        "caf\\xe9.md": "0",
        "two\\nlines.md": "1",
        "two\\\\nlines.md": "2",
        "Case.md": "3",
        "case.md": "4",
        "a\\tb.md": "5",
    }
    assert rows.problems() == {} and shown("ünï/日本.md") == "ünï/日本.md"


def test_links_and_loops(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("# Secret")
    (tmp_path / "secret.zip").write_bytes(zip_bytes({"s.md": b"# Secret"}))
    for name, target in {
        "alias.md": "good.md",
        "again": ".",
        "out.md": "../secret.md",
        "out.zip": "../secret.zip",
        "self.md": "self.md",
        "none.md": "nowhere",
    }.items():
        (folder / name).symlink_to(target)
    rows = read_beside_good(tmp_path)
    assert rows.text("alias.md") == GOOD.decode() and "Secret" not in str(rows)
    problems = rows.problems()
    assert problems.pop("self.md")  # Python's words for a loop differ by version
    assert problems == {
        "out.md": "a link that leads out of the folder",
        "out.zip": "a link that leads out of the folder",
        "none.md": "not a regular file, or a broken link",
    }


def test_what_the_user_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in" / "shut").mkdir(parents=True)
        for path in ("in/good.md", "in/bad.md", "in/bad.zip"):
            (root / path).write_bytes(GOOD)
        root.chmod(0o755)
        for path in ("in/bad.md", "in/bad.zip", "in/shut"):
            (root / path).chmod(0)
        monkeypatch.chdir(root)
        root_user = os.geteuid() == 0  # who may read everything
        if root_user:
            os.seteuid(65534)
        try:
            files = list(local_files("in", "s", Selection(), Limits(1 << 20)))
        finally:
            if root_user:
                os.seteuid(0)
    assert {file.path: file.problem for file in files} == {
        "good.md": None,
        "bad.md": "cannot be read: Permission denied",
        "bad.zip": "cannot be read: Permission denied",
        "shut": "the folder cannot be read: Permission denied",
    }


def test_fifty_megabytes_on_one_line(folder: Path, tmp_path: Path) -> None:
    line = b"word " * (10 << 20)
    (folder / "long.md").write_bytes(line)
    rows = read_beside_good(tmp_path)
    assert rows.problems() == {"long.md": "52,428,800 bytes, more than the limit of 16,777,216"}
    rows = read_beside_good(tmp_path, block={"max_bytes": 64 << 20})
    assert len(rows.text("long.md")) == len(line)


@pytest.mark.slow
def test_a_child_is_bounded_in_time_and_memory() -> None:
    """Three children: one is stopped by its clock, one by its memory, the last one answers."""
    page = b"<p>" + b"<b>x</b>" * 120_000  # 3.5 s to parse
    slow, good = sandbox.parse_apart(
        [("html", page), ("html", b"<p>Good page.</p>")], children=1, cpu_seconds=0
    )
    assert slow == {
        "problem": "its html parser took more than 0 s of processor time",
        "limit": True,
    }
    assert good["text"] == "Good page.\n"
    page = b"<p>" + b"word " * (1 << 20)
    large, good = sandbox.parse_apart(
        [("html", page), ("html", b"<p>Good page.</p>")], children=1, memory=72 << 20
    )
    words = "its html parser needs more than 72 MiB of memory"
    assert large == {"problem": words, "limit": True}
    assert good["text"] == "Good page.\n"


def test_a_crash_costs_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever kills the child, the file says so and the next one is parsed."""
    started: list[int] = []
    start = sandbox.Child._start

    def killed_at_first(self: sandbox.Child) -> object:
        process = start(self)
        if not started:
            process.kill()
        started.append(process.pid)
        return process

    monkeypatch.setattr(sandbox.Child, "_start", killed_at_first)
    items = [("html", f"<p>page {n}</p>".encode()) for n in range(3)]
    first, *rest = parse_batch(items, children=1)
    assert first == {"problem": "its html parser crashed (SIGKILL)", "limit": True}
    assert [item["text"] for item in rest] == ["page 1\n", "page 2\n"] and len(started) == 2
