"""Where documents come from: folders and globs, addresses, git, JSON lines, and the cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError, InputError, ServiceError
from stages.sources import cached
from stages.sources.files import glob_pattern
from stages.sources.parse import Item, parse_batch
from tests.stages.sources import docx_bytes, pdf_bytes, read, zip_bytes

GUIDE = {
    "index.md": b"# Index\n",
    "deep/er/plan.md": b"# Plan\n",
    "deep/notes.txt": b"Notes.\n",
    "decisions/0001.md": b"# Decision\n",
    ".git/config.md": b"# Hidden\n",
}


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, data in GUIDE.items():
        file = tmp_path / "guide" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "guide"


def test_globs() -> None:
    def matches(glob: str, *paths: str) -> list[bool]:
        return [glob_pattern(glob).fullmatch(path) is not None for path in paths]

    assert matches("**/*.md", "a.md", "x/y/a.md", "a.mdx", "x/a.txt") == [True, True, False, False]
    assert matches("*.md", "a.md", "x/a.md") == [True, False]
    assert matches("x/**", "x/a", "x/y/a", "xy/a", "x/") == [True, True, False, True]
    assert matches("x/**/a.?", "x/a.b", "x/y/z/a.b", "xa.b") == [True, True, False]
    assert matches("dagster.Asset*", "dagster.AssetKey", "dagsterXAssetKey") == [True, False]


@pytest.mark.parametrize(
    ("uri", "chosen", "found"),
    [
        ("guide", {}, ["decisions/0001.md", "deep/er/plan.md", "deep/notes.txt", "index.md"]),
        ("guide", {"exclude": ["decisions/**", "*.md"]}, ["deep/er/plan.md", "deep/notes.txt"]),
        ("guide", {"include": ["**/*.txt", "index.md"]}, ["deep/notes.txt", "index.md"]),
        ("guide/**/*.md", {"exclude": ["decisions/**"]}, ["deep/er/plan.md", "index.md"]),
        ("guide/deep/*", {}, ["notes.txt"]),
        ("guide/index.md", {}, ["index.md"]),
    ],
)
def test_folders_and_globs(
    uri: str, chosen: dict[str, list[str]], found: list[str], guide: Path, tmp_path: Path
) -> None:
    for place in (uri, str(tmp_path / uri), (tmp_path / uri).as_uri().replace("%2A", "*")):
        rows = read(tmp_path, place, **chosen)
        assert list(rows) == found
        assert rows.problems() == {}
        for path, row in rows.items():
            base = "guide/deep" if uri == "guide/deep/*" else "guide"
            assert row["git_path"] == (f"{base}/{path}" if place == uri else None)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's own file system in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    files = {**GUIDE, "page.html": b"<h1>Page</h1>", "more.zip": zip_bytes({"in/a.md": b"# A\n"})}
    for name, data in files.items():
        system.pipe(f"/bucket/{name}", data)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_an_address_that_fsspec_understands(bucket: str, tmp_path: Path) -> None:
    rows = read(tmp_path, bucket, exclude=["decisions/**"])
    assert list(rows) == [
        *("deep/er/plan.md", "deep/notes.txt", "index.md", "more.zip/in/a.md", "page.html"),
    ]
    assert rows.text("index.md") == "# Index\n" and rows.text("page.html") == "# Page\n"
    assert rows["index.md"]["git_path"] is None
    assert list(read(tmp_path, f"{bucket}/**/*.md", exclude=["d*/**"])) == ["index.md"]
    assert list(read(tmp_path, f"{bucket}/index.md")) == ["index.md"]
    assert list(read(tmp_path, f"{bucket}/more.zip", include=["in/*"])) == ["in/a.md"]
    small = read(tmp_path, bucket, include=["*.md", "deep/*"], block={"max_bytes": 7})
    assert small.problems() == {"index.md": "8 bytes, more than the limit of 7"}


def test_an_address_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Install s3fs.*") as caught:
        read(tmp_path, "s3://bucket/docs")
    assert "s3://" in str(caught.value) and "next:" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: Protocol not known: nope"):
        read(tmp_path, "nope://x")
    with pytest.raises(ServiceError, match="cannot be listed: FileNotFoundError"):
        read(tmp_path, "memory://nowhere")


def test_an_http_page(tmp_path: Path) -> None:
    """A real server on this machine; what it refuses is said."""
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page.html").write_bytes(b"<h1>Served</h1>")
    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_address[1]}"
            assert read(tmp_path, f"{base}/page.html").text("page.html") == "# Served\n"
            with pytest.raises(ServiceError, match=r"cannot be listed: FileNotFoundError"):
                read(tmp_path, f"{base}/absent.html")
        finally:
            server.shutdown()
            thread.join()


def test_json_lines(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"text": "# One\n", "path": "one.md", "licence": "MIT", "language": "de"},
        {"text": "Two", "id": 7, "title": "The second"},
        {"text": "<p>kept as text</p>", "path": "b/page.html", "id": "p3", "extra": 1},
        b'{"text": broken}',
        {"title": "no text"},
        {"text": ["not", "text"]},
        b'"only a string"',
        {"text": "x", "path": "../out.md"},
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        {"text": "x" * 200},
        b"",
        {"text": ""},
        {"text": "Unnamed"},
        {"text": "Again", "path": "one.md"},
        b'{"text": "\xff"}',
        {"text": "nul \0"},
        {"text": "x" * 5000},
    ]
    data = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    block = {"max_bytes": 100}
    rows = read(tmp_path, str(tmp_path / "rows.jsonl"), licence="CC0-1.0", block=block)
    one = rows["one.md"]
    assert (one["format"], one["title"], one["licence"]) == ("markdown", "One", "MIT")
    assert one["language"] == "de" and one["md5"] == hashlib.md5(b"# One\n").hexdigest()
    assert (rows["7"]["text"], rows["7"]["title"]) == ("Two", "The second")
    assert rows["7"]["licence"] == "CC0-1.0" and rows.text("line 14") == "Unnamed"
    assert rows.text("b/page.html#p3") == "<p>kept as text</p>"
    problems = rows.problems()
    assert problems.pop("line 10").startswith("line 10: ")  # too deep: Python's own words
    assert problems.pop("line 4").startswith("line 4: not JSON text: Expecting value")
    assert problems.pop("line 9").startswith("line 9: not JSON text: 'utf-8' codec can't encode")
    assert problems.pop("line 16").startswith("line 16: not JSON text: 'utf-8' codec can't decode")
    assert problems == {
        "line 5": "line 5: no text",
        "line 6": "line 6: its text is not a string",
        "line 7": "line 7: not an object",
        "line 8": "line 8: its path leads out of the source",
        "line 11": "line 11: 200 bytes, more than the limit of 100",
        "line 13": "empty",
        "one.md (2)": "another document is called one.md too",
        "line 17": "binary: holds NUL bytes",
        "line 18": "line 18: more than the limit of 100 bytes",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_text('{"text": "In a folder", "id": "a"}\n')
    assert list(read(tmp_path, str(tmp_path / "folder"))) == ["rows.jsonl/a"]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.fixture
def repository_of_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "state"))
    repo = tmp_path / "repo"
    (repo / "docs").mkdir(parents=True)
    (repo / "docs" / "a.md").write_bytes(b"# First\r\n")
    (repo / "alias.md").symlink_to("docs/a.md")
    (repo / "out.md").symlink_to("/etc/passwd")
    (repo / "more.zip").write_bytes(zip_bytes({"z.md": b"# Z\n"}))
    (repo / os.fsdecode(b"caf\xe9.md")).write_text("# Coffee\n")
    git(repo, "init", "-q", "-b", "main")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "first")
    git(repo, "tag", "v1")
    return repo


def test_a_git_repository_at_a_revision(repository_of_docs: Path, tmp_path: Path) -> None:
    repo = repository_of_docs
    uri = f"git+{repo}"
    rows = read(tmp_path, uri, revision="v1")
    assert list(rows) == ["alias.md", "caf\\xe9.md", "docs/a.md", "more.zip/z.md", "out.md"]
    assert rows.text("docs/a.md") == rows.text("alias.md") == "# First\r\n"
    assert rows["docs/a.md"]["git_path"] is None
    assert rows.problems() == {"out.md": "a link that leads to no file of the repository"}

    first = git(repo, "rev-parse", "v1")
    (repo / "docs" / "a.md").write_bytes(b"# Second\n")
    git(repo, "commit", "-qam", "second")
    pin = tmp_path / "docs.rev"
    for revision, text in (("main", "# Second\n"), ("v1", "# First\r\n"), (first, "# First\r\n")):
        pin.write_text(f"{revision}  # what it is\n")
        assert read(tmp_path, f"{uri}", path=str(pin), include=["docs/*"]).text("docs/a.md") == text
    repo.rename(tmp_path / "gone")  # a commit that the mirror holds needs no repository
    assert read(tmp_path, uri, revision=first).text("docs/a.md") == "# First\r\n"
    with pytest.raises(ServiceError, match="git fetch failed"):
        read(tmp_path, uri, revision="main")


def test_git_sources_that_cannot_be_read_say_what_to_do(
    repository_of_docs: Path, tmp_path: Path
) -> None:
    uri = f"git+{repository_of_docs}"
    with pytest.raises(InputError, match="no revision 'v9'"):
        read(tmp_path, uri, revision="v9")
    for path in (".", "absent.rev"):
        with pytest.raises(ConfigError, match="names no revision"):
            read(tmp_path, uri, path=path)
    with pytest.raises(ServiceError, match=r"git clone failed.*does not exist"):
        read(tmp_path, f"git+{tmp_path}/nowhere", revision="v1")
    for bad in ("ext::sh -c true", "--upload-pack=x"):
        with pytest.raises(ConfigError, match="not the address of a git repository"):
            read(tmp_path, f"git+{bad}", revision="v1")
    with pytest.raises(ConfigError, match="names no revision"):
        read(tmp_path, uri, revision="--output=x")


def test_what_was_parsed_once_is_not_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_STATE_DIR", str(tmp_path / "state"))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(pdf_bytes("A page of words."))
    (folder / "b.docx").write_bytes(docx_bytes())
    (folder / "c.md").write_bytes(b"# C\n")
    (folder / "same.md").write_bytes(b"# C\n")
    (folder / "same.txt").write_bytes(b"# C\n")
    asked: list[list[str]] = []

    def counted(items: Sequence[Item], children: int | None = None) -> list[dict[str, Any]]:
        asked.append([kind for kind, _ in items])
        return parse_batch(items, children)

    monkeypatch.setattr(cached, "parse_batch", counted)
    first = read(tmp_path, str(folder))
    written = (tmp_path / "out" / "s.parquet").read_bytes()
    assert asked == [["pdf", "docx", "markdown", "text"]]  # equal bytes of one kind: once
    assert first["same.txt"]["headings"] == [] != first["same.md"]["headings"]
    assert read(tmp_path, str(folder)) == first and len(asked) == 1
    assert (tmp_path / "out" / "s.parquet").read_bytes() == written
    (folder / "c.md").write_bytes(b"# Changed\n")
    assert read(tmp_path, str(folder)).text("c.md") == "# Changed\n"
    assert asked[1:] == [["markdown"]]


def test_an_answer_that_a_bound_cut_short_is_not_kept(tmp_path: Path) -> None:
    from resources.content_cache import ContentCache

    cache = ContentCache(tmp_path / "c.sqlite")
    answers = iter([{"problem": "too slow", "limit": True}, {"format": "text", "headings": []}])
    items = [("pdf", b"x")]
    for expected in ("too slow", None, None):
        (parsed,) = cached.parse_cached(items, cache, lambda _: [next(answers)])
        assert parsed.get("problem") == expected
