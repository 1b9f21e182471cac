#!/usr/bin/env bash
# Resolve requirements/cpu.lock again from pyproject.toml: pinned, with hashes, no host names.
# TORCH_WHEELS: a folder with torch's CPU wheel, when pip finds it locally.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --extra cpu --extra dev --override requirements/overrides.txt \
  ${TORCH_WHEELS:+--find-links "$TORCH_WHEELS"} --generate-hashes --python-version 3.11 \
  --no-emit-index-url --no-header --prerelease if-necessary-or-explicit \
  --output-file requirements/cpu.lock
