from __future__ import annotations

from pathlib import Path

import pytest

from contracts.settings import ROOT, Settings
from pipelines import doctor
from tests.conftest import free_port


def test_this_environment_is_whole() -> None:
    found = doctor.doctor(Settings.from_env())
    assert found["ok"], found["missing"]
    assert found["packages"]["dagster"] and found["engine"]
    assert "missing" not in doctor.render(found)


def test_what_is_missing_is_named_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", {"no-such-package": "a test"})
    monkeypatch.setattr(doctor, "ENGINES", ("no-such-engine",))
    found = doctor.doctor(Settings.from_env())
    assert not found["ok"]
    assert "no-such-package: a test" in found["missing"]
    assert "next: make setup" in doctor.render(found)


def test_wrong_params_are_shown(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text() + "\nchunk: 1\n")
    found = doctor.doctor(Settings.from_env({"RATCHET_ROOT": str(tmp_path)}))
    assert not found["ok"]
    assert "did you mean 'chunks'" in doctor.render(found)


def test_addresses_are_tried_and_passwords_never_shown() -> None:
    settings = Settings.from_env(
        {"POSTGRES_URL": f"postgresql://me:secret@127.0.0.1:{free_port()}/x"}
    )
    found = doctor.addresses(settings)
    assert found["POSTGRES_URL"]["answers"] is False
    assert "secret" not in str(found)
    assert found["REDIS_URL"] == {"url": None, "answers": None}
