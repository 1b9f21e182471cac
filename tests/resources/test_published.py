"""Publishing: what passes, what stays hidden, what two publishers and a kill leave behind."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from contracts.digests import path_md5
from contracts.errors import InputError, NotFoundError, QualityError
from contracts.settings import Settings
from resources import published
from resources.index import MANIFEST, open_index, read_manifest
from resources.index.files import copy_sparse
from resources.published import collect, publish, rollback, tombstones, versions
from resources.published_reader import Tombstones
from resources.versions import Store
from tests.resources.indexes import make_index, policy_for

NAMES = {"a": ["1.md", "2.md"], "b": ["1.md", "3.md"], "c": ["1.md", "2.md", "4.md"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three indexes: b lacks 2.md of a, c has it again."""
    home = tmp_path_factory.mktemp("made")
    return {tag: make_index(home / tag, names, tag=tag) for tag, names in NAMES.items()}


def put(index: Path, settings: Settings, keep: int = 3) -> dict[str, Any]:
    return publish(index, settings, policy_for(index, keep=keep))


def check_ledger(settings: Settings) -> list[dict[str, Any]]:
    """Every line is whole, numbered once, and the last about the pointer is the pointer."""
    lines = versions(settings)
    raw = (settings.state_dir / "indexes/versions.jsonl").read_text().splitlines()
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert [json.loads(line)["seq"] for line in raw] == [line["seq"] for line in lines]
    moved = [line for line in lines if line["event"] != "collect"]
    now = published.published(settings)
    assert now is not None and moved[-1] | now == moved[-1]
    return lines


def test_publish_points_to_an_immutable_copy(settings: Settings, made: dict[str, Path]) -> None:
    first, second = put(made["a"], settings), put(made["b"], settings)
    assert second["previous"] == first["version"]
    path = published.published_path(settings)
    assert path_md5(path) == second["md5"] == path_md5(made["b"])
    assert put(made["b"], settings) == second  # again: nothing new
    assert [line["event"] for line in check_ledger(settings)] == ["publish", "publish"]
    assert [line["live"] for line in versions(settings)] == [False, True]


def test_nothing_published_and_half_an_index_are_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="No index has been published"):
        published.published_path(settings)
    assert published.published(settings) is None and tombstones(settings) == frozenset()
    with pytest.raises(NotFoundError, match="No index has been published"):
        rollback(settings)
    half = make_index(tmp_path / "half", ["1.md"])
    policy = policy_for(half)
    (half / MANIFEST).unlink()
    with pytest.raises(InputError, match="unfinished"):
        publish(half, settings, policy)


def test_a_pointer_of_the_first_release_is_replaced(
    settings: Settings, made: dict[str, Path]
) -> None:
    settings.state_dir.mkdir()
    pointer = settings.state_dir / "published_index.json"
    pointer.write_text('{"md5": "x.dir", "path": "indexes/x", "previous": null}')
    assert published.published(settings) is None
    assert put(made["a"], settings)["previous"] is None
    pointer.write_text("[]")
    with pytest.raises(InputError, match="pointer to the published index cannot be read"):
        published.published(settings)


# -- policy ------------------------------------------------------------------------------------


def test_what_is_below_the_policy_is_refused_and_the_old_one_stays(
    settings: Settings, made: dict[str, Path], tmp_path: Path
) -> None:
    old = put(made["a"], settings)
    index = make_index(tmp_path / "blind", ["9.md"], recall=0.89)
    with pytest.raises(QualityError, match=r"finds 0\.8900 .* 0\.9 is the least"):
        put(index, settings)
    for golden in (0.59, math.nan):
        with pytest.raises(QualityError, match=r"recall_at_10 on the golden .* 0\.6 is the least"):
            publish(made["b"], settings, policy_for(made["b"], golden=golden))
    other = policy_for(made["a"])
    with pytest.raises(QualityError, match="tried on another index"):
        publish(made["b"], settings, other)
    other.report.write_text('{"metrics": {}}')
    with pytest.raises(QualityError, match="cannot be used: KeyError"):
        publish(made["b"], settings, other)
    other.report.unlink()
    with pytest.raises(QualityError, match="not tried on the golden questions"):
        publish(made["b"], settings, other)
    assert Store(settings).read() == old and len(check_ledger(settings)) == 1


def test_an_index_without_measured_recall_is_refused(
    settings: Settings, made: dict[str, Path], tmp_path: Path
) -> None:
    index = Path(shutil.copytree(made["a"], tmp_path / "index"))
    manifest = read_manifest(index)
    del manifest["recall"]
    (index / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(QualityError, match="unknown share"):
        put(index, settings)


def _flip(path: Path) -> None:
    """One byte of a vector: same length, still loads."""
    file = max(path.rglob("chunk_0.mmap"), key=lambda item: item.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(40)
        byte = stream.read(1)
        stream.seek(40)
        stream.write(bytes([byte[0] ^ 1]))


def _truncate(path: Path) -> None:
    with next(path.rglob("page_0.dat")).open("r+b") as stream:
        stream.truncate(100)


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("harm", [_flip, _truncate, _no_manifest])
def test_a_damaged_index_is_refused_and_the_old_one_stays(
    settings: Settings, made: dict[str, Path], tmp_path: Path, harm: Any
) -> None:
    old = put(made["a"], settings)
    index = Path(shutil.copytree(made["b"], tmp_path / "index"))
    policy = policy_for(index)
    harm(index)
    with pytest.raises(InputError, match=r"damaged|unfinished") as caught:
        publish(index, settings, policy)
    assert str(index) in str(caught.value) and "dvc repro index" in str(caught.value)
    assert Store(settings).read() == old
    assert sorted(item.name for item in (settings.state_dir / "indexes").glob("*/")) == [
        old["version"]
    ]


def test_publishing_again_heals_a_stored_version(settings: Settings, made: dict[str, Path]) -> None:
    put(made["a"], settings)
    _truncate(published.published_path(settings))
    put(made["a"], settings)
    assert path_md5(published.published_path(settings)) == path_md5(made["a"])
    assert len(check_ledger(settings)) == 1


# -- deleted documents -------------------------------------------------------------------------


def test_deleted_documents_are_hidden_until_they_come_back(
    settings: Settings, made: dict[str, Path]
) -> None:
    put(made["a"], settings)
    hidden = Tombstones(settings, made["a"])
    assert hidden() is None and hidden.known_digest() == hidden.digest() == ""
    assert put(made["b"], settings)["tombstones"] == ["docs:2.md"]
    assert hidden.known_digest() is None and hidden.digest() == hidden.known_digest() != ""
    only = hidden()  # a reader of the older version learns it from the same file
    assert only is not None and only.without_documents == ["docs:2.md"] and hidden() is only
    assert Tombstones(settings, made["b"])() is None  # it holds no such document
    assert put(made["c"], settings)["tombstones"] == ["docs:3.md"]
    assert hidden() is None and hidden.digest() == ""


def test_a_rollback_keeps_deleted_text_hidden_unless_told(
    settings: Settings, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = put(made["a"], settings), put(made["b"], settings)
    monkeypatch.setattr(shutil, "copytree", None)  # a rollback is a flip: nothing is copied
    back = rollback(settings)
    assert back["version"] == a["version"] and back["previous"] == b["version"]
    assert tombstones(settings) == {"docs:2.md"}
    assert (back["md5"], back["event"]) == (a["md5"], "rollback")
    assert rollback(settings, a["version"][:12], restore=True)["tombstones"] == []
    # 3.md of b, which nobody publishes any more, is hidden by the next publish of a's content
    assert put(made["a"], settings)["tombstones"] == ["docs:3.md"]
    assert [line["event"] for line in check_ledger(settings)] == [
        "publish", "publish", "rollback", "rollback", "publish",
    ]  # fmt: skip


def test_a_rollback_goes_one_back_each_time_and_names_what_it_cannot(
    settings: Settings, made: dict[str, Path]
) -> None:
    a, b, c = (put(made[tag], settings) for tag in "abc")
    assert rollback(settings)["version"] == b["version"]
    assert rollback(settings)["version"] == a["version"]
    with pytest.raises(NotFoundError, match="no earlier version"):
        rollback(settings)
    with pytest.raises(NotFoundError, match="'zz' names 0 versions") as caught:
        rollback(settings, "zz")
    assert caught.value.offenders == [a["version"], b["version"], c["version"]]
    assert rollback(settings, c["version"])["version"] == c["version"]


def test_old_versions_go_but_never_what_is_published_or_read(
    settings: Settings, made: dict[str, Path]
) -> None:
    from resources.published_reader import open_published

    a = put(made["a"], settings)
    reader = open_published(settings)
    held = reader._view  # a search that is still under way in a
    for tag in "bcb":
        put(made[tag], settings, keep=1)
    home = settings.state_dir / "indexes"
    names = {tag: read_manifest(made[tag])["content"][:32] for tag in "abc"}
    stored = {item.name for item in home.glob("*/")}
    assert stored == {names["a"], names["b"], names["c"]}  # read; live; the one before
    reader.close()
    del reader, held
    assert collect(settings, keep=1) == [a["version"]]
    assert {item.name for item in home.glob("*/")} == {names["b"], names["c"]}
    with pytest.raises(NotFoundError, match="names 0 versions"):
        rollback(settings, names["a"])
    assert check_ledger(settings)[-1]["event"] == "collect"
    assert collect(settings, keep=1) == []


# -- kills and races ---------------------------------------------------------------------------


def test_a_torn_ledger_line_is_cut_off(settings: Settings, made: dict[str, Path]) -> None:
    put(made["a"], settings)
    ledger = settings.state_dir / "indexes/versions.jsonl"
    with ledger.open("a") as stream:
        stream.write('{"seq": 2, "eve')
    assert len(versions(settings)) == 1
    put(made["b"], settings)
    assert [line["event"] for line in check_ledger(settings)] == ["publish", "publish"]


def _steps(index: Path, kill_at: int, record: Path | None) -> None:
    """Publish, and die at the n-th change of the file system, as the interpreter reports it."""
    count, changes = 0, ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
    seen: list[str] = []
    armed = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if not armed:
            return
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if not (writes or event in changes or event == "fcntl.flock"):
            return
        count += 1
        seen.append(f"{event} {args[0]}" if event != "fcntl.flock" else "the lock: /")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    settings = Settings.from_env()
    policy = policy_for(index, keep=1)
    armed = True
    publish(index, settings, policy)
    armed = False
    if record is not None:
        record.write_text(json.dumps(seen))


def clone(source: Path, target: Path) -> None:
    """A copy that keeps the holes: most of a small index is space that the engine reserved."""
    shutil.copytree(source, target, copy_function=lambda a, b: copy_sparse(Path(a), Path(b)))


def _child(*args: Any) -> int:
    child = multiprocessing.get_context("fork").Process(target=_steps, args=args)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.slow
def test_killed_at_every_step_the_old_or_the_new_one_is_published(
    settings: Settings, made: dict[str, Path], tmp_path: Path
) -> None:
    for tag in "ca":  # so that there is one to collect
        put(made[tag], settings)
    state, base = settings.state_dir, tmp_path / "base"
    old, new = Store(settings).read(), read_manifest(made["b"])["content"][:32]
    assert old is not None
    clone(state, base)
    assert _child(made["b"], 0, tmp_path / "steps.json") == 0
    steps: list[str] = json.loads((tmp_path / "steps.json").read_text())
    inside = [n for n, step in enumerate(steps, 1) if ".part/" in step or "/" not in step]
    # Each file of a copy or a removal is one step; of those, some.
    chosen = sorted({*range(1, len(steps) + 1)} - {*inside} | {*inside[1:-1:30]})
    assert len(chosen) >= 10 and any("published_index" in steps[n - 1] for n in chosen)
    outcomes = set()
    for number in chosen:
        shutil.rmtree(state)
        clone(base, state)
        assert _child(made["b"], number, None) == -signal.SIGKILL, steps[number - 1]
        now = Store(settings).read()
        assert now is not None and now["version"] in (old["version"], new), steps[number - 1]
        outcomes.add(now["version"] == new)
        read_manifest(published.published_path(settings), digests=True)
        hidden = set(now["tombstones"])
        assert hidden == ({"docs:2.md", "docs:4.md"} if now["version"] == new else {"docs:4.md"})
        assert put(made["b"], settings, keep=1)["version"] == new  # a re-run finishes
        lines = check_ledger(settings)
        assert [line["event"] for line in lines].count("publish") == 3, steps[number - 1]
        assert not [*state.glob("indexes/*.part"), *state.glob("indexes/*.gone")]
    assert outcomes == {False, True}


def _publish(path: Path, report: Any, queue: multiprocessing.Queue[str]) -> None:
    queue.put(str(publish(path, Settings.from_env(), report)["version"]))


def test_several_at_once_leave_one_whole_index_and_ledger(
    settings: Settings, made: dict[str, Path]
) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    policies = {tag: policy_for(index) for tag, index in made.items()}
    children = [
        context.Process(target=_publish, args=(made[tag], policies[tag], queue)) for tag in "abcabc"
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    names = {read_manifest(index)["content"][:32] for index in made.values()}
    assert {queue.get(timeout=5) for _ in children} == names
    lines = check_ledger(settings)
    assert {line["version"] for line in lines} == names
    for before, after in itertools.pairwise(lines):
        assert after["previous"] == before["version"]
    with open_index(published.published_path(settings)) as index:
        assert index.manifest["content"].startswith(lines[-1]["version"])
