#!/usr/bin/env bash
# The checks. `fast`: lint, types, import rules, unit tests. `all`: that and the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$1"; }

step "lint"; ruff check . && ruff format --check .
step "import rules"; lint-imports --no-cache
step "types, beside the fast tests"  # one process of 20 s, which would leave a core idle
types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy >"$types" 2>&1 &
mypy=$!
fast=0
python -m pytest -q -m "not slow" -n 2 || fast=$?
wait "$mypy" || { cat "$types"; exit 1; }
cat "$types"
[ "$fast" = 0 ] || exit "$fast"
if [ "${1:-all}" = all ]; then
  # A file stays on one worker: its tests share a real run, a Ray cluster, an MLflow store. Not
  # loadgroup: pytest 9.2 keeps a test's id, so xdist 3.8 spreads a group without saying so.
  step "slow tests"; python -m pytest -q -m slow -n 2 --dist loadfile
fi
