from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.errors import ConfigError
from contracts.params import load_params, parse_params


@pytest.fixture
def data(repository: Path) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((repository / "params.yaml").read_text())
    return copy.deepcopy(value)


def test_our_params_are_valid(repository: Path) -> None:
    assert load_params(repository / "params.yaml").chunks.max_tokens <= 254


@pytest.mark.parametrize(
    ("path", "near"),
    [
        (("chunks", "max_token"), "max_tokens"),
        (("chunk",), "chunks"),
        (("documents", "sources", "docs", "url"), "uri"),
        (("base_model", "nano", "step"), "steps"),
    ],
)
def test_misspelt_key_is_refused_with_its_neighbour(
    data: dict[str, Any], path: tuple[str, ...], near: str
) -> None:
    block = data
    for part in path[:-1]:
        block = block[part]
    block[path[-1]] = 1
    with pytest.raises(ConfigError, match=rf"{'.'.join(path)}: unknown key; did you mean '{near}'"):
        parse_params(data)


@pytest.mark.parametrize("name", ["size", "nfiles"])
def test_names_that_the_run_cache_ignores_are_refused_with_the_reason(
    data: dict[str, Any], name: str
) -> None:
    data["documents"]["sources"][name] = {"uri": "docs", "path": "docs"}
    with pytest.raises(ConfigError, match="10296"):
        parse_params(data)


def test_every_offender_is_listed_at_once(data: dict[str, Any]) -> None:
    data["chunks"]["max_tokens"] = "many"
    del data["adapter"]["rank"]
    data["index"]["size"] = 3
    with pytest.raises(ConfigError) as caught:
        parse_params(data, "here.yaml")
    text = str(caught.value)
    assert all(
        part in text for part in ("chunks.max_tokens", "adapter.rank", "index.size", "here.yaml")
    )


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_params(tmp_path / "params.yaml")
