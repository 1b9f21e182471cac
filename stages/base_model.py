"""base_model: the language model that everything else is built on, as one local folder.

In: the block ``base_model`` of params.yaml. Out: a Hugging Face folder (config, safetensors,
tokenizer with chat template, model card) whose ``recipe.json``, written last, says where it came
from.

``kind: nano`` trains the built-in model on this machine (``stages/nano``); ``kind: hub`` fetches a
pinned revision of a hub id, the one case in which this project reaches for the network; ``kind:
local`` copies a folder. Any causal language model with a chat template will do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from contracts import offline
from contracts.errors import ConfigError, InputError, ServiceError
from contracts.params import BaseModelParams, Params
from contracts.settings import Settings
from stages import harness

#: What a serving folder consists of; training leftovers, other formats and code stay behind.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")


def run(paths: Any, params: Params) -> dict[str, float]:
    """Write ``paths.out``; returns what is known of the model."""
    block = params.base_model
    if block.kind == "nano":
        from stages.nano.build import build

        out = harness.fresh_dir(paths.out)
        return build(block.nano, out, Settings.from_env().state_dir / "training", harness.progress)
    source = fetch(block) if block.kind == "hub" else local_folder(block)
    copy(source, paths.out)
    metrics = validate(paths.out)
    recipe = {"kind": block.kind, "id": block.id, "revision": _revision(block, source)}
    harness.write_json(paths.out / "recipe.json", recipe)
    return metrics


def fetch(block: BaseModelParams) -> Path:
    """The snapshot of ``block.id`` in the local hub cache, downloaded where it is not there yet.

    Raises ConfigError without an id, ServiceError where the hub cannot be reached.
    """
    if not block.id:
        raise ConfigError(
            "base_model.kind is hub, but no model is named.",
            where="params.yaml: base_model.id",
            next="set base_model.id to organisation/name@revision",
        )
    offline.allow_hub()
    from huggingface_hub import snapshot_download

    name, _, revision = block.id.partition("@")
    harness.progress(f"base_model: fetching {name} {revision or '(its main branch)'} from the hub")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
    except Exception as error:  # HTTP, DNS, gated, missing: the library raises a dozen types
        raise ServiceError(
            f"The hub did not give {block.id}: {type(error).__name__}: {_first_line(error)}",
            where="params.yaml: base_model.id",
            next="check the name and the network, or set base_model.kind to nano (no download)",
        ) from error
    return Path(found)


def local_folder(block: BaseModelParams) -> Path:
    """The folder that params name. Raises ConfigError."""
    if not block.path:
        raise ConfigError(
            "base_model.kind is local, but no folder is named.",
            where="params.yaml: base_model.path",
            next="set base_model.path to a folder with config.json and safetensors",
        )
    folder = Path(block.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "The folder of the base model does not exist.",
            where=f"params.yaml: base_model.path = {block.path}",
            next="correct the path; relative ones start at the repository root",
        )
    return folder


def copy(source: Path, out: Path) -> None:
    """Copy what serving needs; links of the hub cache become files."""
    chosen = sorted({path for pattern in PATTERNS for path in source.glob(pattern)})
    harness.fresh_dir(out)
    for path in chosen:
        if path.is_file() and path.name != "recipe.json":
            shutil.copyfile(path, out / path.name)


def validate(folder: Path) -> dict[str, float]:
    """Check that the folder is a causal language model with a chat template.

    Raises InputError naming everything that is missing.
    """
    offenders = []
    if not (folder / "config.json").is_file():
        offenders.append("config.json is missing")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        offenders.append("no *.safetensors file (pickled weights are not accepted)")
    if not offenders:
        offenders += _tokenizer_problems(folder) + _config_problems(folder)
    if offenders:
        raise InputError(
            "This is not a model that the pipeline can tune and serve.",
            where=str(folder),
            offenders=offenders,
            next="choose a causal language model saved by transformers, with a chat template",
        )
    return {"parameters": float(sum(_elements(path) for path in weights))}


def _tokenizer_problems(folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a foreign folder makes the library raise
        return [f"the tokenizer does not load: {_first_line(error)}"]
    if not tokenizer.chat_template:
        return ["the tokenizer has no chat template (is this a base checkpoint, not -instruct?)"]
    return []


def _config_problems(folder: Path) -> list[str]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # as above
        return [f"config.json does not load: {_first_line(error)}"]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return [f"'{config.model_type}' is not a causal language model"]
    return []


def _elements(path: Path) -> int:
    """Number of weights in a safetensors file, read from its header."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for width in tensor["shape"]:
                count *= width
            total += count
    return total


def _revision(block: BaseModelParams, source: Path) -> str | None:
    """The commit of a hub snapshot: its folder in the cache is named by it."""
    return source.name if block.kind == "hub" else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    harness.main("base_model", run, paths=("out",))
