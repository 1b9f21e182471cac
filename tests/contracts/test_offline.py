from __future__ import annotations

from contracts import offline


def test_every_switch_is_set_and_none_overridden() -> None:
    environ = {"HF_HUB_OFFLINE": "0"}
    offline.apply(environ)
    assert environ["HF_HUB_OFFLINE"] == "0"  # somebody's explicit word stands
    assert set(offline.SWITCHES) <= set(environ)


def test_a_hub_id_lifts_only_the_hub_switches() -> None:
    environ: dict[str, str] = {}
    offline.apply(environ)
    offline.allow_hub(environ)
    assert environ["HF_HUB_OFFLINE"] == "0"
    assert environ["DO_NOT_TRACK"] == "1"
