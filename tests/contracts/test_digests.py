from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from contracts import digests


def test_same_digests_as_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dvc.lock says of a file and of a folder is what we compute."""
    from dvc.repo import Repo

    folder = tmp_path / "folder"
    (folder / "b" / "c").mkdir(parents=True)
    for name in ("a.txt", "a-b.txt", "b/c/d.bin", "b/e ü.txt", "b.txt"):
        (folder / name).write_bytes(name.encode() * 100)
    (tmp_path / "file.txt").write_text("hello\n")
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "s": {
                        "cmd": "cp -r folder out",
                        "deps": ["folder", "file.txt"],
                        "outs": ["out"],
                    }
                }
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).reproduce()
    entry = yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]["s"]
    locked = {item["path"]: item for key in ("deps", "outs") for item in entry[key]}
    assert digests.path_md5(folder) == locked["folder"]["md5"] == locked["out"]["md5"]
    assert digests.path_md5(tmp_path / "file.txt") == locked["file.txt"]["md5"]
    assert digests.path_size(folder) == locked["folder"]["size"]
