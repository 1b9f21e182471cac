from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts.digests import path_md5
from contracts.errors import InputError, NotFoundError
from contracts.settings import ROOT, Settings
from resources import published


def make_index(path: Path, text: str, blocks: int = 1) -> Path:
    path.mkdir(parents=True)
    for number in range(blocks):
        (path / f"data-{number}").write_text(text * 1000)
    (path / "manifest.json").write_text("{}")
    return path


def test_publish_points_to_an_immutable_copy(settings: Settings, tmp_path: Path) -> None:
    first = published.publish(make_index(tmp_path / "a", "one"), settings)
    second = published.publish(make_index(tmp_path / "b", "two"), settings)
    assert second["previous"] == first["md5"]
    path = published.published_path(settings)
    assert path_md5(path) == second["md5"] == path_md5(tmp_path / "b")
    assert published.publish(tmp_path / "b", settings)["md5"] == second["md5"]  # again: nothing new


def test_nothing_published_and_half_an_index_are_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="No index has been published"):
        published.published_path(settings)
    (tmp_path / "half").mkdir()
    with pytest.raises(InputError, match="not whole"):
        published.publish(tmp_path / "half", settings)


def test_killed_during_a_publish_the_old_index_stays(settings: Settings, tmp_path: Path) -> None:
    old = published.publish(make_index(tmp_path / "old", "old"), settings)
    make_index(tmp_path / "new", "new" * 200, blocks=400)
    code = (
        "from pathlib import Path; from contracts.settings import Settings;"
        "from resources import published;"
        f"published.publish(Path({str(tmp_path / 'new')!r}), Settings.from_env())"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ.copy())
    home = settings.state_dir / "indexes"
    deadline = time.monotonic() + 30
    while not list(home.glob("*.part/data-1*")):  # the copy is under way
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(home.glob("*.part")), "the kill came too late to prove anything"
    assert published.published(settings) == old
    new = published.publish(tmp_path / "new", settings)  # the next one finishes and tidies up
    assert path_md5(published.published_path(settings)) == new["md5"]
    assert not list(home.glob("*.part"))


def _publish(path: Path, queue: multiprocessing.Queue[str]) -> None:
    queue.put(str(published.publish(path, Settings.from_env())["md5"]))


def test_two_at_once_leave_one_whole_index(settings: Settings, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    indexes = [make_index(tmp_path / str(number), str(number)) for number in range(4)]
    children = [context.Process(target=_publish, args=(index, queue)) for index in indexes]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    pointed = published.published(settings)
    assert pointed is not None
    assert pointed["md5"] in {queue.get(timeout=5) for _ in indexes}
    assert path_md5(published.published_path(settings)) == pointed["md5"]
