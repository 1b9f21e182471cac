"""stages.vllm_schema: the installed vLLM's flags without importing it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.errors import ConfigError, InputError
from stages import bundle, vllm_schema
from tests.stages.evaluation_models import params

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


@pytest.fixture(scope="module")
def flags() -> dict[str, vllm_schema.Flag]:
    return vllm_schema.load()


def test_flags_have_the_types_that_the_source_gives_them(
    flags: dict[str, vllm_schema.Flag],
) -> None:
    assert flags["max-model-len"].types == {"int"}
    assert flags["max-num-seqs"].types == {"int"}  # spelt with a default of its own in vLLM
    assert flags["enforce-eager"].types == {"bool"}
    assert flags["gpu-memory-utilization"].types == {"float"}
    assert flags["host"].types == {"str"} and flags["host"].optional
    assert flags["api-key"].types == {"list"}
    assert flags["speculative-config"].types == {"json"}
    assert "bfloat16" in flags["dtype"].choices
    assert {"auto", "generate", "pooling"} <= set(flags["runner"].choices)  # a nested Literal
    assert len(flags) > 250
    typed = [flag for flag in flags.values() if flag.types or flag.choices]
    assert len(typed) / len(flags) > 0.9


def test_vllm_itself_is_not_imported() -> None:
    code = "import sys; from stages import vllm_schema as s; s.load(); print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_default_launch_configuration_is_valid() -> None:
    vllm_schema.validate(bundle.launch_args(params().bundle))


def test_every_offender_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError) as error:
        vllm_schema.validate(
            {
                "max-model-length": 1024,
                "max_num_seqs": 3,
                "dtype": "bfloat",
                "block-size": "many",
                "enforce-eager": 1,
                "max-num-seqs": None,
                "seed": True,
                "kv-cache-memory-bytes": "1.5G",  # valid: vLLM reads it
                "speculative-config": "{not json",
                "port": 8000,
            }
        )
    assert error.value.offenders == [
        "--max-model-length: unknown flag; did you mean --max-model-len?",
        "--max_num_seqs: unknown flag; did you mean --max-num-seqs?",
        f"--dtype: 'bfloat' is none of {', '.join(DTYPES)}; did you mean 'float'?",
        "--block-size: 'many' is str, not int",
        "--enforce-eager: 1 is int, not bool",
        "--seed: True is bool, not int",
        "--speculative-config: '{not json' is str, not json",
    ]


def test_a_source_of_another_shape_is_refused(tmp_path: Path) -> None:
    """A vLLM that was reorganised must not pass as one without flags."""
    for name in ("config/a.py", "engine/arg_utils.py", "entrypoints/launchers/cli_args.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    with pytest.raises(InputError, match="0 flags found"):
        vllm_schema.load(tmp_path)


REAL = """
import json, sys
sys.path.insert(0, "serving/engines")
import vllm_launcher  # answers for the distribution's name
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = {}
for action in make_arg_parser(FlexibleArgumentParser())._actions:
    for option in action.option_strings:
        if option.startswith("--"):
            kind = getattr(action.type, "__name__", None)
            found[option[2:]] = [kind, list(action.choices) if action.choices else None]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_table_equals_the_real_parser(flags: dict[str, vllm_schema.Flag]) -> None:
    """vLLM's own parser, built by importing it (20 s): the same flags, the same choices."""
    done = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, check=True, timeout=240
    )
    real = json.loads(done.stdout.splitlines()[-1])
    negations = {name for name in real if name.startswith("no-") and name[3:] in real}
    assert set(real) - negations - {"help"} == set(flags)
    for name, (kind, choices) in real.items():
        if name in negations or name == "help":
            continue
        flag = flags[name]
        if (
            choices and flag.choices
        ):  # all2all-backend's parser hides one value that its type allows
            assert {item for item in choices if item is not None} <= set(flag.choices), name
        if kind in ("int", "float") and flag.types and "list" not in flag.types:
            assert kind in flag.types, name
