"""base_model: local and hub models are checked before anything is built on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError, InputError, ServiceError
from contracts.params import BaseModelParams, Params
from stages import base_model
from tests.stages.evaluation_models import params, save_base


def with_block(**values: Any) -> Params:
    everything = params()
    block = BaseModelParams(nano=everything.base_model.nano, **values)
    return everything.model_copy(update={"base_model": block})


class Paths:
    def __init__(self, out: Path) -> None:
        self.out = out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal language model that is not ours."""
    return save_base(tmp_path_factory.mktemp("foreign") / "model")


def test_local_model_is_copied_without_its_clutter(foreign: Path, tmp_path: Path) -> None:
    (foreign / "optimizer.pt").write_bytes(b"x")
    (foreign / "recipe.json").write_text("{}")
    out = tmp_path / "out"
    metrics = base_model.run(Paths(out), with_block(kind="local", path=str(foreign)))
    assert metrics["parameters"] > 1000
    assert not (out / "optimizer.pt").exists()
    assert (out / "model.safetensors").read_bytes() == (foreign / "model.safetensors").read_bytes()
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe == {"kind": "local", "id": None, "revision": None}, "no path of this machine"


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError) as error:
        base_model.run(Paths(tmp_path / "out"), with_block(kind="local", path=str(folder)))
    assert len(error.value.offenders) == 2
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_no_chat_template(foreign: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    base_model.copy(foreign, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no chat template"):
        base_model.validate(folder)


def test_not_a_causal_language_model(foreign: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    base_model.copy(foreign, folder)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="clip"):
        base_model.validate(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "local"}, "base_model.path"),
        ({"kind": "local", "path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"kind": "hub"}, "base_model.id"),
    ],
)
def test_missing_settings(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        base_model.run(Paths(tmp_path / "out"), with_block(**values))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def refuse(name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((name, revision))
        raise OSError("Name or service not known\nand more")

    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(switch, "1")  # what allow_hub changes is put back after the test
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ServiceError, match="kind to nano"):
        base_model.run(Paths(tmp_path / "out"), with_block(kind="hub", id="org/name@abc"))
    assert asked == [("org/name", "abc")]


def test_hub_snapshot_names_its_revision(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123abcd"
    base_model.copy(foreign, snapshot)
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    base_model.run(Paths(tmp_path / "out"), with_block(kind="hub", id="org/name"))
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe == {"kind": "hub", "id": "org/name", "revision": "0123abcd"}
