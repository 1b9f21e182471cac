"""Single docstrings of installed packages: texts of very mixed length that nobody here wrote.

In: the running environment. Out: the same texts in the same shuffled order wherever the same
packages are installed. The embedding benchmarks read them.
"""

from __future__ import annotations

import ast
import random
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("dagster", "mlflow", "pandas", "sklearn", "sqlalchemy", "torch", "transformers")
MIN_CHARACTERS = 20


def texts(count: int, seed: int = 7) -> list[str]:
    """``count`` different docstrings, drawn from all the packages that are installed."""
    draw = random.Random(seed)
    files: list[Path] = []
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or []:
            files += sorted(Path(folder).rglob("*.py"))
    draw.shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(tree):
            doc = ast.get_docstring(node) if isinstance(node, kinds) else None
            if doc and len(doc) >= MIN_CHARACTERS:
                found[doc.encode("utf-8", "replace").decode()] = None
        if len(found) >= 3 * count:
            break
    if len(found) < count:
        raise ValueError(f"{len(found)} docstrings are installed, {count} are wanted")
    return draw.sample(list(found), count)
