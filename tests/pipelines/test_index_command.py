"""`ratchet index`: look, go back, tidy up, and publish nothing that was not accepted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contracts.errors import InputError, QualityError
from contracts.settings import ROOT, Settings
from pipelines import cli
from resources import published
from tests.resources.indexes import make_index, policy_for


def ratchet(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["index", *words])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(autouse=True)
def _params(settings: Settings) -> None:
    shutil.copy(ROOT / "params.yaml", settings.root)


def test_the_index_commands_work_together(settings: Settings, tmp_path: Path) -> None:
    assert "no index has been published yet" in ratchet("versions")
    with pytest.raises(QualityError):
        ratchet("publish")  # there is nothing that passed its checks
    versions = []
    for names in (["1.md", "2.md"], ["1.md"]):
        index = make_index(tmp_path / f"{len(names)}", names)
        versions.append(published.publish(index, settings, policy_for(index))["version"])
    assert ratchet("rollback") == (
        f"back to {versions[0]}: 4 chunks of 2 documents; documents hidden: 1\n"
    )
    assert "documents hidden: 0" in ratchet("rollback", "--to", versions[0], "--restore")
    assert ratchet("gc") == "nothing to remove\n"
    lines = ratchet("versions").splitlines()
    assert [line.split()[-4:] for line in lines] == [
        ["4", "chunks,", "0", "hidden"],
        ["2", "chunks,", "1", "hidden"],
        ["4", "chunks,", "1", "hidden"],
        ["4", "chunks,", "0", "hidden"],
    ]
    assert [line[0] for line in lines] == [" ", " ", " ", "*"]


def test_a_damaged_ledger_is_named_with_its_line(settings: Settings, tmp_path: Path) -> None:
    index = make_index(tmp_path / "1", ["1.md"])
    published.publish(index, settings, policy_for(index))
    ledger = settings.state_dir / "indexes" / "versions.jsonl"
    ledger.write_text(ledger.read_text() + "[]\ngarbage\n")
    with pytest.raises(InputError) as caught:
        ratchet("versions")
    assert [line.split(":")[0] for line in caught.value.offenders] == ["line 2", "line 3"]
    with pytest.raises(InputError, match="ledger"):
        ratchet("gc")
