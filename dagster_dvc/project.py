"""``DvcProject``: one checkout with a ``dvc.yaml``, as this package sees it.

In: the project's root. Out: its stages, its lock, its versions. Reading is by plain code and never
takes DVC's locks, so that it works while a stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from . import lockfile, manifest
from .hashing import Hasher
from .lockfile import LockedStage
from .manifest import Manifest, Stage
from .state import State

CODE_SUFFIXES = frozenset(
    {
        ".py",
        ".ipynb",
        ".sh",
        ".bash",
        ".r",
        ".jl",
        ".sql",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".c",
        ".cc",
        ".cpp",
        ".h",
        ".hpp",
        ".cu",
        ".java",
        ".scala",
    }
)


class DvcProject:
    """One checkout of a DVC project.

    Args:
        root: the folder that holds ``dvc.yaml`` (``.dvc`` is in it or above it).
        name: names the checkout's pool and its observation step; give each project its own where
            one Dagster instance serves several.

    Raises:
        ProjectNotFound: ``root`` has no ``dvc.yaml``, or there is no ``.dvc`` in or above it.
    """

    def __init__(self, root: Path | str, *, name: str = "dvc") -> None:
        self.root = Path(root).resolve()
        self.name = name
        self.dvc_dir = manifest.find_dvc_dir(self.root)
        self.work_dir = self.dvc_dir / "tmp" / "dagster_dvc"

    def __repr__(self) -> str:
        return f"DvcProject({str(self.root)!r})"

    @cached_property
    def _hasher(self) -> Hasher:
        return Hasher(self.dvc_dir.parent, self.work_dir / "md5.json")

    def manifest(self) -> Manifest:
        """The resolved stages as the files say now (1.5 ms where nothing has changed)."""
        return manifest.load(self.root)

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The stages of ``dvc.yaml`` by name, as the file says now."""
        return self.manifest().stages

    def lock(self) -> dict[str, LockedStage]:
        """``dvc.lock`` now, by DVC's own stage names (``documents@docs``)."""
        return lockfile.read(self.root / "dvc.lock")

    def md5(self, path: str) -> str | None:
        """The md5 that DVC would compute for a path of the workspace, from the root.

        A path that is absent but tracked by a ``.dvc`` file has the md5 written there: that is
        what DVC would check out.
        """
        found = self._hasher.md5(self.root / path)
        return found if found is not None else self._tracked_md5(path)

    def _tracked_md5(self, path: str) -> str | None:
        from .yaml12 import loads

        try:
            outs = (loads((self.root / f"{path}.dvc").read_bytes()) or {}).get("outs") or ()
        except OSError:
            return None
        name = Path(path).name
        return next((str(out["md5"]) for out in outs if out.get("path") == name), None)

    def is_code(self, path: str) -> bool:
        """The default rule: a source file by its suffix, or a folder with ``__init__.py``."""
        if Path(path).suffix.lower() in CODE_SUFFIXES:
            return True
        return (self.root / path / "__init__.py").is_file()

    def state(self, is_code: Callable[[str], bool] | None = None) -> State:
        """The project at this moment: versions and verdicts (see ``state.py``)."""
        return State(self.manifest(), self.lock(), self.md5, is_code or self.is_code)

    def data_version(self, stage: str, partition: str | None = None) -> str | None:
        """The data version that ``dvc.lock`` holds for a stage; None where it never ran.

        Raises:
            KeyError: there is no such stage or key.
        """
        state = self.state()
        return state.data_version(state.manifest.node(stage, partition))

    def code_version(self, stage: str) -> str:
        """The code version of a stage as the files say now, by the default ``is_code``.

        Raises:
            KeyError: there is no such stage.
        """
        state = self.state()
        return state.code_version(state.manifest.stages[stage])
