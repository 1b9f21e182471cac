"""Installing releases and moving channels: whole or not at all, whatever is killed or raced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from contracts.digests import dir_md5
from contracts.errors import GateError, InputError, NotFoundError
from contracts.records import Channel
from contracts.settings import ROOT, Settings
from resources import releases
from tests.serving.conftest import until
from tests.serving.factory import build


def test_an_installed_release_is_a_copy_that_verifies(settings: Settings) -> None:
    path = releases.install(build(settings.root), settings.root, settings)
    installed = releases.verify(settings, path.name)
    assert installed.path == path == settings.releases_dir / installed.id
    assert dir_md5(installed.index) == installed.release.members["index"].md5
    assert installed.answers.top_k == 3 and installed.vectors.batch == 8
    assert installed.prompt().version == "v1"
    (settings.root / "data/index/chunks.json").write_text("[]")  # DVC rewrites data/
    releases.verify(settings, path.name)
    assert [item.id for item in releases.list_releases(settings)] == [path.name]
    assert not list(settings.releases_dir.glob(".installing-*"))


def test_installing_again_changes_nothing(settings: Settings) -> None:
    source = build(settings.root)
    path = releases.install(source, settings.root, settings)
    before = {item: item.stat().st_mtime_ns for item in path.rglob("*")}
    assert releases.install(source, settings.root, settings) == path
    assert {item: item.stat().st_mtime_ns for item in path.rglob("*")} == before


def test_a_damaged_copy_is_found_and_replaced(settings: Settings) -> None:
    source = build(settings.root)
    path = releases.install(source, settings.root, settings)
    (path / "bundle/checkpoint/config.json").write_text("{}")
    (path / "prompts.json").unlink()
    with pytest.raises(InputError, match="is damaged") as error:
        releases.verify(settings, path.name)
    assert len(error.value.offenders) == 2
    releases.install(source, settings.root, settings)
    releases.verify(settings, path.name)


def test_data_that_is_not_the_releases_is_refused_and_named(settings: Settings) -> None:
    source = build(settings.root)
    data = settings.root / "data"
    (data / "index/chunks.json").write_text((data / "index/chunks.json").read_text() + " ")
    (data / "prompts.json").unlink()
    with pytest.raises(InputError, match="not what release") as error:
        releases.install(source, settings.root, settings)
    assert [line.split(" ")[0] for line in error.value.offenders] == ["index", "prompts"]
    assert releases.list_releases(settings) == []
    assert list(settings.releases_dir.iterdir()) == [settings.releases_dir / ".lock"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": {}}, "members.index: missing"),
        ({"prompt": {"name": "answer"}}, "prompt.sha256: missing"),
        ({"params": {}}, "params.answers"),
        ({"members": {k: {"path": f"../{k}", "md5": "0", "size": 1}
                      for k in ("index", "bundle", "prompts")}}, "leads out of the checkout"),
        ({"members": {k: {"path": f"/{k}", "md5": "0", "size": 1}
                      for k in ("index", "bundle", "prompts")}}, "leads out of the checkout"),
    ],
)  # fmt: skip
def test_a_release_that_cannot_be_served_is_refused(
    settings: Settings, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match="cannot be served") as error:
        releases.install(build(settings.root, **changes), settings.root, settings)
    assert words in str(error.value)


def test_a_release_file_must_be_itself(settings: Settings) -> None:
    path = build(settings.root)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "eval_set": "1" * 32}))
    with pytest.raises(InputError, match="edited after it was made"):
        releases.read_release(path)
    path.write_text(json.dumps({**body, "extra": 1}))
    with pytest.raises(InputError, match="not a release"):
        releases.read_release(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot be read"):
        releases.read_release(path)
    with pytest.raises(NotFoundError):
        releases.read_release(path.with_name("other.json"))
    failed = releases.read_release(build(settings.root, gate={"verdict": "INVALID"}))
    with pytest.raises(GateError, match="INVALID"):
        releases.certified(failed, "here")
    for name in ("../../etc", "", "0" * 15, "G" * 16):
        with pytest.raises(InputError, match="not a release id"):
            releases.load(settings, name)


def test_a_kill_leaves_only_what_the_next_install_sweeps(settings: Settings) -> None:
    """Killed while it copies: a member that is a pipe holds it there."""
    source = build(settings.root)
    (settings.root / "data/chunks.parquet").unlink()
    os.mkfifo(settings.root / "data/chunks.parquet")
    code = (
        "import sys; from pathlib import Path; from resources import releases;"
        "from contracts.settings import Settings;"
        "import stat; stat.S_ISFIFO = lambda mode: False;"  # or copyfile refuses the pipe
        "releases.install(Path(sys.argv[1]), Path(sys.argv[2]), Settings.from_env())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(settings.root)],
        cwd=ROOT,
        env={**os.environ, "RATCHET_STATE_DIR": str(settings.state_dir)},
    )
    until(lambda: list(settings.releases_dir.glob(".installing-*/prompts.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert releases.list_releases(settings) == []
    assert list(settings.releases_dir.glob(".installing-*"))
    (settings.root / "data/chunks.parquet").unlink()
    (settings.root / "data/chunks.parquet").write_bytes(b"PAR1one")
    path = releases.install(source, settings.root, settings)
    releases.verify(settings, path.name)
    assert not list(settings.releases_dir.glob(".installing-*"))


def test_races_end_in_one_whole_release(settings: Settings) -> None:
    source = build(settings.root)
    found: list[Path] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            found.append(releases.install(source, settings.root, settings))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(found)) == 1 and len(found) == 8
    releases.verify(settings, found[0].name)


def test_a_full_disk_is_told_and_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("resources.releases.shutil.copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        releases.install(build(settings.root), settings.root, settings)
    assert not list(settings.releases_dir.glob("[0-9a-f.]*-*"))


def channel(release: str, name: str = "stable") -> Channel:
    return Channel(name=name, release=release, engine_url="http://127.0.0.1:1", model="m")


def test_a_channel_is_whole_at_every_moment(settings: Settings) -> None:
    assert releases.read_channel(settings, "stable") is None
    stop = threading.Event()
    seen: set[str] = set()
    torn: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                pointer = releases.read_channel(settings, "stable")
                seen.add(pointer.release if pointer else "")
            except Exception as error:
                torn.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(100):
        releases.write_channel(settings, channel(f"{number % 2:016x}"))
    stop.set()
    thread.join()
    assert not torn and seen >= {"0" * 16}
    assert [item.name for item in settings.channels_dir.iterdir()] == ["stable.json"]


def test_channels_are_listed_and_named_strictly(settings: Settings) -> None:
    for name in ("stable", "canary"):
        releases.write_channel(settings, channel("0" * 16, name))
    assert [item.name for item in releases.list_channels(settings)] == ["canary", "stable"]
    for name in ("../x", "Stable", "", "a" * 40):
        with pytest.raises(InputError, match="not a channel name"):
            releases.read_channel(settings, name)
    (settings.channels_dir / "stable.json").write_text("{")
    with pytest.raises(InputError, match="pointer cannot be read"):
        releases.read_channel(settings, "stable")
