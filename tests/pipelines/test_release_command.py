"""`ratchet release`: releases told apart, verified, and written up, over real installed ones."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from contracts.errors import InputError, NotFoundError, RatchetError
from contracts.records import Channel, Release
from contracts.settings import Settings
from pipelines import cli
from resources import releases
from tests.serving.factory import build


def ratchet(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["release", *words])
    if isinstance(result.exception, RatchetError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def two(settings: Settings) -> tuple[str, str]:
    """Two installed releases; the second one is on the channel stable and in data/."""
    ids = []
    for mark in ("one", "two"):
        ids.append(releases.install(build(settings.root, mark), settings.root, settings).name)
    releases.write_channel(
        settings,
        Channel(name="stable", release=ids[1], engine_url="http://127.0.0.1:1", model="nano"),
    )
    return ids[0], ids[1]


def test_a_release_is_found_by_id_prefix_channel_and_file(
    settings: Settings, two: tuple[str, str]
) -> None:
    assert f"{two[1]}  gate PASS" in ratchet("list")
    assert ratchet("list").splitlines()[1].endswith("on stable")
    for name in ([], [two[1]], [two[1][:6]], ["stable"], ["data/release.json"]):
        if name == ["data/release.json"]:
            name = [str(settings.root / name[0])]
        assert ratchet("show", *name).startswith(f"release {two[1]}")
    shown = json.loads(ratchet("show", two[0], "--json"))
    assert Release.compute_id(shown) == two[0]
    with pytest.raises(NotFoundError, match=two[0]):
        ratchet("show", "0" * 16)


def test_a_diff_names_every_member_and_the_prompts_lines(two: tuple[str, str]) -> None:
    changes = json.loads(ratchet("diff", *two, "--json"))
    members = {change["name"] for change in changes if change["kind"] == "member"}
    assert members == {"index", "bundle", "prompts", "chunks"}
    text = ratchet("diff", *two)
    assert "-Answer from the passages. (one)" in text
    assert "+Answer from the passages. (two)" in text
    assert "0 differences" in ratchet("diff", two[0], two[0])


def test_every_byte_is_verified(settings: Settings, two: tuple[str, str]) -> None:
    assert "are whole" in ratchet("verify", two[0])
    assert "members are right" in ratchet("verify")
    (settings.releases_dir / two[0] / "prompts.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        ratchet("verify", two[0])
    assert "prompts" in caught.value.offenders[0]
    (settings.root / "data/index/chunks.json").unlink()
    with pytest.raises(NotFoundError) as missing:
        ratchet("verify")
    assert any(line.startswith("index (data/index)") for line in missing.value.offenders)


@pytest.mark.parametrize("field", sorted(set(Release.model_fields) - {"id"}))
def test_every_field_of_a_release_shapes_its_id(settings: Settings, field: str) -> None:
    """Change any single input and the id changes: each leaf of each field, one at a time."""
    body = json.loads(build(settings.root).read_text())
    changed = list(_changes(body[field]))
    assert changed
    ids = {Release.compute_id(body | {field: value}) for value in changed}
    assert len(ids) == len(changed) and body["id"] not in ids


def _changes(value: object) -> list[object]:
    """``value`` with one leaf changed, for every leaf; and with a key left out."""
    if isinstance(value, dict):
        return [value | {key: inner} for key, item in value.items() for inner in _changes(item)] + [
            {k: v for k, v in value.items() if k != key} for key in value
        ]
    return [f"{value}x"]


def test_the_cards_show_the_release_and_say_what_is_missing(
    settings: Settings, two: tuple[str, str]
) -> None:
    card = ratchet("card")
    assert two[1] in card and "This card was written on a machine that lacks" in card
    out = settings.root / "technical.md"
    ratchet("card", "--technical-file", "--out", str(out))
    text = out.read_text()
    found = json.loads(ratchet("show", "--json"))
    for member in found["members"].values():
        assert member["md5"] in text
    for number in range(1, 7):
        assert f"\n## {number}. " in text
    assert "**GAP**" in text
