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
  # A file stays on one worker: its tests share a real run, a Ray cluster, an MLflow store. Not
  # loadgroup: pytest 9.2 keeps a test's id, so xdist 3.8 spreads a group without saying so.
  step "slow tests"; python -m pytest -q -m slow -n 2 --dist loadfile
fi
