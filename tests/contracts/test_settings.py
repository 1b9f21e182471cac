from __future__ import annotations

import pytest

from contracts.errors import ConfigError
from contracts.settings import Settings


def test_defaults_are_local_and_embedded() -> None:
    settings = Settings.from_env({})
    assert settings.host == "127.0.0.1"
    assert settings.mlflow_uri.startswith("sqlite:////")
    assert settings.qdrant_url is settings.postgres_url is settings.redis_url is None
    assert settings.releases_dir.is_relative_to(settings.state_dir)


def test_empty_variables_count_as_unset() -> None:
    assert Settings.from_env({"QDRANT_URL": "", "MLFLOW_TRACKING_URI": ""}).qdrant_url is None


def test_a_key_is_read_and_never_shown() -> None:
    environ = {"EMBEDDINGS_URL": "http://gpu:8000", "EMBEDDINGS_API_KEY": "sk-secret"}
    settings = Settings.from_env(environ)
    assert settings.embeddings_url == "http://gpu:8000"
    assert settings.embeddings_api_key == "sk-secret" and "sk-secret" not in repr(settings)
    assert Settings.from_env({}).embeddings_url is Settings.from_env({}).embeddings_api_key is None


def test_every_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"RATCHET_GATEWAY_PORT": "eighty", "RATCHET_MLFLOW_PORT": "70000"})
    assert "RATCHET_GATEWAY_PORT='eighty'" in str(caught.value)
    assert "RATCHET_MLFLOW_PORT='70000'" in str(caught.value)
