#!/usr/bin/env bash
# Build .venv from requirements/cpu.lock: every package pinned, every file checked by hash.
#
# torch is the one package whose CPU build is not on PyPI. pip may know a local copy (find-links or
# an extra index in its configuration); uv does not read pip's configuration, so the folder is
# handed on. Otherwise the wheel comes from PyTorch's own CPU index, with the same hash.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}

if ! command -v "$python" >/dev/null; then
  for other in python3 python; do
    if command -v "$other" >/dev/null && "$other" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
      python=$other
    fi
  done
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "setup: Python 3.11 is needed and '$python' is not it. Next: make setup PYTHON=/path/to/python3.11" >&2
  exit 1
fi

started=$SECONDS
echo "setup: installing the pinned environment into .venv (about a minute, 4 GB)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.8"

torch=$(sed -nE 's/^(torch==[^ ]+).*/\1/p' requirements/cpu.lock)
wheels=.venv/wheels
mkdir -p "$wheels"
if ! .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$wheels" "$torch" 2>/dev/null; then
  echo "setup: pip knows no $torch here; asking PyTorch's CPU index"
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" --dest "$wheels" "$torch"
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --require-hashes \
  --find-links "$wheels" -r requirements/cpu.lock
rm -rf "$wheels"
# Compiled once here: where bytecode is not written, every process start parses everything again
# (vLLM starts in 38 s instead of 56 s). Not what runs rarely or never, nearly half of the bytes;
# make lets Python keep what it compiles of that. Some files are templates and no Python (|| true).
rarely='/(tests?|testing|_vendor|transformers/models/[b-z][^/]*|vllm/model_executor/models|plotly'
rarely+='|anthropic|databricks|faker|langchain_c[^/]*|mypy|nltk|numba|pip|playwright|statsmodels'
rarely+='|sentry_sdk|sympy/physics|ray/(rllib|serve|tune|train|llm))/'
.venv/bin/python -m compileall -qq -j 0 -x "$rarely" .venv/lib/python3.11/site-packages || true
ln -sfn ../../tools/ratchet .venv/bin/ratchet
touch .venv/.ready
echo "setup: done in $((SECONDS - started)) s"
