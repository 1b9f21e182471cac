"""Text that nobody here wrote: the documentation of the installed packages.

In: the running environment's site-packages. Out: docstrings, files of documentation, source files;
the same ones in the same order wherever the same packages are installed. Every benchmark that needs
a corpus takes it from here.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: Where single docstrings and sources are taken from, as far as installed.
PACKAGES = (
    "dagster",
    "mlflow",
    "pandas",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "torch",
    "transformers",
)
MIN_CHARACTERS, MAX_CHARACTERS = 500, 12_000  # of a document
GENERATED = {"plotly"}  # thousands of modules that differ in a word: near copies, no documents
DEFINITION = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def site() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def sources(*packages: str) -> list[Path]:
    """The Python files of some packages."""
    return [file for name in packages for file in sorted((site() / name).rglob("*.py"))]


def docstrings(file: Path) -> list[tuple[str, str]]:
    """(name of the class or function, "" for the module; its docstring), the outermost first."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template that is not Python yet
        return []
    found = [
        (getattr(node, "name", ""), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, DEFINITION)
    ]
    return [(name, _encodable(text)) for name, text in found if text]


def draw(count: int, seed: int = 7, shortest: int = 20) -> list[str]:
    """``count`` different docstrings of very mixed length, drawn from all of :data:`PACKAGES`.

    Raises ValueError when fewer are installed.
    """
    lottery = random.Random(seed)
    files = sources(*PACKAGES)
    lottery.shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        found.update((text, None) for _, text in docstrings(file) if len(text) >= shortest)
        if len(found) >= 3 * count:
            break
    if len(found) < count:
        raise ValueError(f"{len(found)} docstrings are installed, {count} are wanted")
    return lottery.sample(list(found), count)


def files() -> Iterator[tuple[str, str]]:
    """(text, format) of the Markdown and reStructuredText files of all packages."""
    for ending, format in (("md", "markdown"), ("rst", "rst")):
        for path in sorted(site().rglob(f"*.{ending}")):
            yield path.read_text(encoding="utf-8", errors="replace"), format


def modules() -> Iterator[tuple[str, str]]:
    """(module, its docstrings as Markdown, a section each) of all packages, by name."""
    for file in sorted(site().rglob("*.py")):
        path = file.relative_to(site())
        if path.parts[0] in GENERATED or any(part.startswith("_vendor") for part in path.parts):
            continue
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        parts = [
            f"## {heading}\n\n{text}\n" if heading else f"{text}\n"
            for heading, text in docstrings(file)
            if len(text) > 80
        ]
        text = "\n".join([f"# {name}\n", *parts])
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            yield name, text


def write(folder: Path, count: int) -> int:
    """Write ``count`` modules below ``folder``, one Markdown file each. Returns their bytes.

    Raises ValueError when the environment holds fewer.
    """
    found = list(modules())
    if len(found) < count:
        raise ValueError(f"{len(found)} modules have enough docstrings, {count} are wanted")
    step = len(found) / count
    size = 0
    for number in range(count):
        name, text = found[int(number * step)]
        path = folder / f"{name.partition('.')[0]}/{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        size += path.write_bytes(text.encode())
    return size


def _encodable(text: str) -> str:
    """The text without lone surrogates, which escapes in a docstring may make."""
    return text.encode("utf-8", "replace").decode()
