"""Training text for the nano model: prose of installed packages that are not the knowledge base.

In: the site-packages folder of the running Python and the list ``PACKAGES`` below.
Out: documents of sections, in a fixed order, and the md5 over all of their text.

Why these: the text has to be technical prose of the kind that the knowledge base holds (guides in
Markdown, docstrings), it has to be on every machine at no download, and the lock file pins it, so
that the md5 is the same wherever the lock is installed. Dagster and this repository's own docs are
what the model is examined on, so they are kept out; so is the standard library, whose text changes
with the patch release of Python.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

#: Folders in site-packages whose docstrings and Markdown are read. Order is part of the recipe.
PACKAGES = (
    "alembic", "celery", "click", "datasets", "docker", "dulwich", "dvc", "evidently", "flask",
    "fsspec", "great_expectations", "huggingface_hub", "jinja2", "mlflow", "peft", "pydantic",
    "ragas", "sqlalchemy", "qdrant_client", "urllib3",
)  # fmt: skip
#: Distributions whose long description (README) is read as a guide.
READMES = (
    "accelerate", "aiohttp", "alembic", "celery", "charset-normalizer", "datasets",
    "defusedxml", "diskcache", "dvc", "email-validator", "evidently", "fastapi", "flask",
    "fsspec", "great-expectations", "huggingface-hub", "kombu", "loguru", "mlflow", "openai",
    "orjson", "peft", "prettytable", "prometheus-client", "psutil", "pydantic",
    "pytest-timeout", "python-dotenv", "qdrant-client", "ragas", "regex", "requests", "rich",
    "ruff", "sacrebleu", "sentence-transformers", "starlette", "tabulate", "tqdm",
    "transformers", "typer", "universal-pathlib", "uvicorn", "voluptuous", "watchdog", "xxhash",
    "yarl",
)  # fmt: skip

MIN_SECTION, MAX_PER_PACKAGE = 160, 700_000  # characters
EXCLUDED = ("dagster", "ratchet")  # never: the model is examined on it
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "node_modules",
    "protos",
    "driver",
}


@dataclass(frozen=True)
class Section:
    """One stretch of prose under one heading; ``text`` has its whitespace collapsed."""

    heading: str
    text: str


@dataclass(frozen=True)
class Text:
    """One document: a module's docstrings or one Markdown file."""

    title: str
    sections: tuple[Section, ...]


def collect(site: Path | None = None) -> list[Text]:
    """Every document of the corpus, in a fixed order, duplicates removed."""
    site = site or Path(sysconfig.get_paths()["purelib"])
    seen: set[str] = set()
    texts: list[Text] = []
    for package in PACKAGES:
        budget = MAX_PER_PACKAGE
        for path in _files(site / package):
            text = (
                read_module(path, site)
                if path.suffix == ".py"
                else read_markdown(path.name, _decode(path))
            )
            text = _unseen(text, seen)
            budget -= sum(len(section.text) for section in text.sections)
            if budget < 0:
                break
            if text.sections:
                texts.append(text)
    for name in READMES:
        for folder in sorted(site.glob(f"{name.replace('-', '_')}-*.dist-info")):
            body = _decode(folder / "METADATA").partition("\n\n")[2]
            text = _unseen(read_markdown(name, body), seen)
            if text.sections:
                texts.append(text)
    return texts


def digest(texts: list[Text]) -> str:
    """md5 over titles, headings and text: what ``base_model.nano.corpus_md5`` must say."""
    md5 = hashlib.md5(usedforsecurity=False)
    for text in texts:
        for section in text.sections:
            md5.update(f"{text.title}\0{section.heading}\0{section.text}\0".encode())
    return md5.hexdigest()


def read_module(path: Path, site: Path) -> Text:
    """The docstrings of one module, a section each."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return Text(path.name, ())
    module = ".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
    sections = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        section = _section(getattr(node, "name", module), ast.get_docstring(node) or "")
        if section:
            sections.append(section)
    return Text(module, tuple(sections))


def read_markdown(name: str, body: str) -> Text:
    """One Markdown or reST file, a section for each heading."""
    title, sections = name, []
    body = re.sub(r"^---\n.*?\n---\n", "", body, flags=re.S)  # front matter
    body = re.sub(r"^([^\n]{3,80})\n(?:={3,}|-{3,}|~{3,})$", r"# \1", body, flags=re.M)
    for part in re.split(r"^(?=#{1,4} )", body, flags=re.M):
        heading, text = "", part
        if part.startswith("#"):
            line, _, text = part.partition("\n")
            heading = _collapse(line.lstrip("# "))[:80]
        section = _section(heading or title, text)
        if section:
            sections.append(section)
    return Text(title, tuple(sections))


def _section(heading: str, text: str) -> Section | None:
    """A section where the text is prose enough, else None."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links keep their words
    text = re.sub(r"<[^>\n]{1,200}>", " ", text)
    text = re.sub(r"(?m)^\s*(?:>>>|\.\.\.|\.\. ).*$", " ", text)  # doctest and reST directives
    text = re.sub(
        r":(?:class|func|meth|ref|py:\w+|attr|mod|paramref|term|exc):`~?\.?([^`<]*)[^`]*`",
        r"`\1`",
        text,
    )
    text = _collapse(text)
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(text) < MIN_SECTION or letters < 0.82 * len(text) or not text.isascii():
        return None
    if any(word in text.lower() for word in EXCLUDED):
        return None
    return Section(heading, text)


def _unseen(text: Text, seen: set[str]) -> Text:
    """``text`` without sections whose opening has occurred before: inherited docstrings repeat."""
    kept = []
    for section in text.sections:
        key = section.text[:120]
        if key not in seen:
            seen.add(key)
            kept.append(section)
    return Text(text.title, tuple(kept))


def _files(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".py", ".md"}
        and not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)
        and not path.name.endswith("_pb2.py")
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _decode(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _collapse(text: str) -> str:
    return " ".join(text.split())
