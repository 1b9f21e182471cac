"""Any ``dvc.yaml`` as Dagster assets: one graph, two drivers. See README.md beside this file."""

from .assets import dvc_assets
from .checkout import Patience
from .clone import CannotTravel, CloneRunner
from .errors import (
    CheckoutBusy,
    DagsterDvcError,
    InputsMissing,
    InvalidProject,
    Offence,
    ProjectNotFound,
    ResolveFailed,
    StageFailed,
)
from .manifest import ResolvedStage, Stage
from .project import DvcProject
from .runner import LocalRunner, StageRequest, StageResult, StageRunner
from .sync import dvc_sync_sensor, sync
from .translator import DagsterDvcTranslator

__all__ = [
    "CannotTravel",
    "CheckoutBusy",
    "CloneRunner",
    "DagsterDvcError",
    "DagsterDvcTranslator",
    "DvcProject",
    "InputsMissing",
    "InvalidProject",
    "LocalRunner",
    "Offence",
    "Patience",
    "ProjectNotFound",
    "ResolveFailed",
    "ResolvedStage",
    "Stage",
    "StageFailed",
    "StageRequest",
    "StageResult",
    "StageRunner",
    "dvc_assets",
    "dvc_sync_sensor",
    "sync",
]
