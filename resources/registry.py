"""MLflow's model registry: every release is a version of the model ``ratchet``.

The bytes live in DVC, so a version points at an *external* logged model whose tags hold the
release id and the digests of bundle, adapter and base. Aliases (``candidate``, ``stable``) replace
the deprecated stages.
"""

from __future__ import annotations

from contracts.records import Release
from contracts.settings import Settings

MODEL = "ratchet"


def register(release: Release, settings: Settings, alias: str) -> str:
    """Register ``release`` once and point ``alias`` at it. Returns the version number."""
    import mlflow

    from resources.tracking import Tracking

    tracking = Tracking(settings)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    client = tracking.client
    version = _version_of(release.id, client)
    if version is None:
        members = {key: release.members[key].md5 for key in ("bundle", "adapter", "base_model")}
        tags = {"ratchet.release": release.id, "ratchet.git_commit": release.git_commit}
        tags |= {f"ratchet.{key}_md5": md5 for key, md5 in members.items()}
        runs = tracking.stage_runs(members["bundle"])
        model = mlflow.create_external_model(
            name=f"{MODEL}-{release.id}",
            source_run_id=runs[0].info.run_id if runs else None,
            tags=tags,
            params={"prompt": f"{release.prompt['name']}/{release.prompt['version']}"},
            model_type="vllm-bundle",
            experiment_id=tracking.experiment,
        )
        version = mlflow.register_model(f"models:/{model.model_id}", MODEL, tags=tags).version
    client.set_registered_model_alias(MODEL, alias, version)
    return str(version)


def _version_of(release_id: str, client: object) -> str | None:
    """The version that already holds this release."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.search_model_versions(  # type: ignore[attr-defined]
            f"name = '{MODEL}' and tag.`ratchet.release` = '{release_id}'"
        )
    except MlflowException:
        return None
    return str(found[0].version) if found else None
