"""Text that nobody here wrote: the docstrings of the installed packages, one document a module.

In: the running environment's site-packages. Out: Markdown files in a folder, the same ones wherever
the same packages are installed. The benchmarks of the knowledge base read them.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS, MAX_CHARACTERS = 500, 12_000
GENERATED = {"plotly"}  # thousands of modules that differ in a word: near copies, no documents


def write(folder: Path, count: int) -> int:
    """Write ``count`` documents below ``folder``. Returns their bytes.

    Raises ValueError when the environment holds fewer.
    """
    found = list(documents())
    if len(found) < count:
        raise ValueError(f"{len(found)} modules have enough docstrings, {count} are wanted")
    step = len(found) / count
    size = 0
    for number in range(count):
        name, text = found[int(number * step)]
        path = folder / f"{name.partition('.')[0]}/{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        size += len(text.encode())
    return size


def documents() -> Iterator[tuple[str, str]]:
    """(module name, Markdown with a section a docstring), in the order of names."""
    site = Path(sysconfig.get_paths()["purelib"])
    for file in sorted(site.rglob("*.py")):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        parts = file.relative_to(site).parts
        if parts[0] in GENERATED or any(part.startswith("_vendor") for part in parts):
            continue
        name = ".".join(file.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
        pieces = [f"# {name}\n"]
        for node in ast.walk(tree):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            doc = ast.get_docstring(node, clean=False)
            if doc and len(doc) > 80:
                heading = getattr(node, "name", "")
                pieces.append(
                    (f"## {heading}\n\n" if heading else "") + inspect.cleandoc(doc) + "\n"
                )
        text = "\n".join(pieces).encode("utf-8", "replace").decode()
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            yield name, text
