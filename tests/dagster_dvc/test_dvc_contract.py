"""The contract with DVC: what `_dvc_internals.py` relies on, and what we compute in its place.

A new DVC version has to pass these before the bound in `_dvc_internals.SUPPORTED` moves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from dvc_fixture import dvc, edit, make_project, repro

from dagster_dvc import DvcProject, InvalidProject, ResolveFailed, _dvc_internals, manifest
from dagster_dvc.hashing import Hasher, directory_entries
from dagster_dvc.yaml12 import loads


def test_the_installed_dvc_is_in_the_tested_range() -> None:
    version = tuple(int(part) for part in metadata.version("dvc").split(".")[:2])
    low, high = _dvc_internals.SUPPORTED
    assert low <= version < high
    assert _dvc_internals._check_version() == metadata.version("dvc")


def test_another_dvc_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvc.__version__", "3.99.0")
    with pytest.raises(_dvc_internals.Unsupported, match=r"DVC 3\.99\.0 .*contract test"):
        _dvc_internals._check_version()


def test_resolved_stages(project: DvcProject) -> None:
    stages = project.manifest().stages
    assert {name: stage.keys for name, stage in stages.items()} == {
        "words": ("a", "b"),
        "merged": (),
        "report": (),
        "score": (),
    }
    one = stages["words"].resolved["a"]
    assert (one.name, one.cmd) == ("words@a", "sh code/words.sh raw/a.txt out/words/a.txt true")
    assert [dep.path for dep in one.deps] == ["raw/a.txt", "code/words.sh"]
    assert one.params[0].values == {"words": {"upper": True}}
    report = stages["report"].first
    assert {params.path: dict(params.values) for params in report.params} == {
        "params.yaml": {"report": {"title": "Words", "threshold": 1e-05, "mode": "on"}},
        "settings.yaml": {"footer": "the end"},
    }
    merged = stages["merged"].first
    assert merged.main is not None and merged.main.path == "out/merged"
    assert [(out.path, out.cache) for out in merged.metrics] == [("out/metrics/merged.json", False)]
    assert stages["merged"].dagster_meta["pool"] == "heavy"
    assert project.manifest().inputs == (
        ".dvc/config",
        ".dvc/config.local",
        "dvc.yaml",
        "params.yaml",
        "settings.yaml",
    )


def test_matrix_vars_wdir_and_flags(tmp_path: Path) -> None:
    project = make_project(
        tmp_path / "project",
        {
            "dvc.yaml": """
vars: [more.yaml, {inline: 7}]
stages:
  grid:
    matrix: {size_of: [s, m], kind: [x]}
    cmd: echo ${item.size_of} ${item.kind} ${inline} > ${item.size_of}-${item.kind}.txt
    outs: ["${item.size_of}-${item.kind}.txt"]
    deps: [in.txt]
  here:
    wdir: sub
    cmd: [echo a > o.txt, "echo ${named} >> o.txt"]
    deps: [../s-x.txt]
    outs: [o.txt]
    frozen: true
    plots: [p.csv: {cache: false}]
""",
            "more.yaml": "named: value\n",
            "in.txt": "",
            "sub/keep.txt": "",
        },
    )
    found = project.manifest()
    assert found.stages["grid"].keys == ("s-x", "m-x")
    here = found.stages["here"].first
    assert here.cmd == ["echo a > o.txt", "echo value >> o.txt"] and here.frozen
    assert [(dep.path, dep.lock_path) for dep in here.deps] == [("s-x.txt", "../s-x.txt")]
    assert [out.path for out in here.outs] == ["sub/o.txt", "sub/p.csv"]
    assert here.main is not None and here.main.lock_path == "o.txt"
    assert "more.yaml" in found.inputs
    (upstream,) = project.state().upstreams(here) or [None]
    assert upstream is None  # frozen: cut off from what it reads


def test_the_manifest_is_kept_until_an_input_changes(
    project: DvcProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = manifest._ask_dvc
    monkeypatch.setattr(manifest, "_ask_dvc", lambda root: asked.append(root) or real(root))
    first = manifest.load(project.root).identity
    assert manifest.load(project.root).identity == first and len(asked) == 0
    for name in ("params.yaml", "settings.yaml", "dvc.yaml"):
        path = project.root / name
        path.write_text(path.read_text() + "\n# changed\n")
        assert manifest.load(project.root).identity != first
    assert len(asked) == 3
    (project.root / "raw/a.txt").write_text("no input of the manifest\n")
    manifest.load(project.root)
    assert len(asked) == 3


def test_a_damaged_cache_is_rebuilt(project: DvcProject) -> None:
    (kept,) = project.work_dir.glob("manifest-*.json")
    kept.write_text(kept.read_text()[:100])
    assert set(project.manifest().stages) == {"words", "merged", "report", "score"}


def test_all_stages_that_dvc_refuses_are_named(project: DvcProject) -> None:
    edit(project.root / "dvc.yaml", "${report.title}", "${report.titel}")
    edit(project.root / "dvc.yaml", "${words.upper}", "${word.upper}")
    with pytest.raises(InvalidProject) as caught:
        project.manifest()
    assert [offence.where for offence in caught.value.offences] == ["dvc.yaml:2", "dvc.yaml:21"]
    assert "report.titel" in str(caught.value) and "word.upper" in str(caught.value)


def test_two_stages_that_claim_one_output_are_refused(project: DvcProject) -> None:
    edit(project.root / "dvc.yaml", "outs: [out/report.txt]", "outs: [out/merged]")
    with pytest.raises(InvalidProject, match=r"out/merged"):
        project.manifest()


def test_broken_yaml_is_dvcs_message(project: DvcProject) -> None:
    (project.root / "dvc.yaml").write_text("stages: [")
    with pytest.raises(ResolveFailed, match=r"dvc\.yaml"):
        project.manifest()


@pytest.mark.slow
def test_the_resolver_process_says_the_same(project: DvcProject, real_resolver: None) -> None:
    command = manifest.internals_command("resolve", str(project.root))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (kept,) = project.work_dir.glob("manifest-*.json")
    assert json.loads(done.stdout) == json.loads(kept.read_text())["answer"]


@pytest.mark.slow
def test_definitions_cost_no_dvc(project: DvcProject, real_resolver: None) -> None:
    """A cold and a warm load, each in a process of its own: DVC is imported by neither."""
    code = (
        "import sys, dagster, yaml; base = set(sys.modules)\n"
        "import dagster_dvc; from pathlib import Path\n"
        "p = dagster_dvc.DvcProject(Path(sys.argv[1])); dagster_dvc.dvc_assets(p)\n"
        "dagster_dvc.dvc_sync_sensor(p)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - base}\n"
        "print(sorted(new - base - set(sys.stdlib_module_names)))"
    )
    for kept in project.work_dir.glob("manifest-*.json"):
        kept.unlink()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(project.root)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "['dagster_dvc']"


# -- hashes and YAML as DVC has them ---------------------------------------------------------------


def test_hashes_are_dvcs(done: DvcProject) -> None:
    lock = done.lock()
    for name, entry in lock.items():
        for path, file in {**entry.deps, **entry.outs}.items():
            assert done.md5(path) == file.md5, (name, path)
    entries = directory_entries(done.manifest().cache, lock["merged"].outs["out/merged"].md5)
    assert entries is not None and set(entries) == {"about.txt", "words.txt"}


def test_folders_with_odd_names_and_dvcignore(tmp_path: Path) -> None:
    files = {
        "dvc.yaml": "stages:\n  s: {cmd: echo > o.txt, deps: [box/data], outs: [o.txt]}\n",
        "box/data/a.txt": "a",
        "box/data/sub/ü ü.txt": "u",
        "box/data/sub.txt": "between sub and sub/",
        "box/data/cache/__pycache__/x.pyc": "no",
        "box/data/sub/secret.log": "no",
        "box/data/sub/kept.log": "yes",
        "box/data/top-only.bin": "no",
        "box/data/sub/top-only.bin": "yes",
        ".dvcignore": "# comment\n__pycache__/\n*.log\n/box/data/top-only.bin\n",
        "box/.dvcignore": "!kept.log\n",
    }
    project = make_project(tmp_path / "project", files)
    repro(project.root)
    locked = project.lock()["s"].deps["box/data"]
    assert project.md5("box/data") == locked.md5
    assert locked.nfiles == 5


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_dvc.hashing._REMEMBER_FROM_BYTES", 10)
    big = tmp_path / "big"
    big.write_text("0123456789")
    memory = tmp_path / "memory.json"
    first = Hasher(tmp_path, memory).md5(big)
    stored = json.loads(memory.read_text())
    stored[str(big)][3] = "remembered"
    memory.write_text(json.dumps(stored))
    assert Hasher(tmp_path, memory).md5(big) == "remembered"
    big.write_text("0123456789x")
    assert Hasher(tmp_path, memory).md5(big) not in ("remembered", first)


def test_an_absent_path_tracked_by_a_dvc_file_has_its_md5(project: DvcProject) -> None:
    (project.root / "raw/big.bin.dvc").write_text("outs:\n- md5: abc\n  path: big.bin\n")
    assert project.md5("raw/big.bin") == "abc"
    assert project.md5("raw/none") is None


def test_yaml_is_read_as_dvc_writes_it(tmp_path: Path) -> None:
    """Values that YAML 1.1 and 1.2 read differently, through DVC's own writer and reader."""
    from dvc.utils.serialize import dumps_yaml, parse_yaml

    values = {
        "floats": [1e-05, 1.5e20, 0.1, -3.0, float("inf")],
        "ints": [0, -7, 10**18],
        "words": ["on", "yes", "no", "off", "y", "1_000", "12:30:45", "0x1F", "010", "1e3", "~"],
        "bools": [True, False],
        "nothing": None,
        "text": "2020-01-01",
    }
    text = dumps_yaml(values)
    assert loads(text) == parse_yaml(text, "x") == values
    plain = "a: 010\nb: 1e3\nc: on\nd: 12:30\ne: 0o17\nf: .5\ng: 2020-01-01\nh: NO\ni: +1\n"
    assert loads(plain) == parse_yaml(plain, "x")


@pytest.mark.slow
def test_the_command_line_accepts_what_we_call(done: DvcProject) -> None:
    """The words that `decision` reads, by the real command line."""
    from dagster_dvc.runner import decision

    def how(*extra: str) -> str | None:
        lines = dvc(done.root, "repro", "--single-item", *extra, "report").stdout.splitlines()
        return decision("report", lines)

    assert how() == "unchanged"
    (done.root / "out/report.txt").unlink()
    assert how() == "run_cache"
    assert how("--force") == "ran"
