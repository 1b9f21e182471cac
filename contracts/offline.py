"""The one place that sets every offline and telemetry switch.

Nothing here reaches for the network unless an address or a hub id says so. The libraries below
disagree about how they are told, so every entry point (stage, gateway, CLI, definitions) calls
:func:`apply` before it imports them. HF libraries stall 35 s offline without theirs.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SWITCHES: dict[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "RAGAS_DO_NOT_TRACK": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def apply(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set every switch that the environment does not set already."""
    for name, value in SWITCHES.items():
        environ.setdefault(name, value)


def allow_hub(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lift the Hugging Face switches for this process: params.yaml named a hub id."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        environ[name] = "0"
