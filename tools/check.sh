#!/usr/bin/env bash
# The checks. `fast`: lint, types, import rules, unit tests. `all`: that and the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$1"; }

step "lint"; ruff check . && ruff format --check .
step "import rules"; lint-imports --no-cache
step "types"; mypy
step "fast tests"; python -m pytest -q -m "not slow" -n 2
if [ "${1:-all}" = all ]; then
  # In one process: they share one real run of the pipeline.
  step "slow tests"; python -m pytest -q -m slow
fi
