# Two commands do everything on a fresh machine with Python 3.11, git and make:
#   make demo   sets up, runs the whole lifecycle once, asks a question, walks the answer back
#   make test   sets up, runs every check
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
# Recipes run with the environment's programs first, in folders with spaces too.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DAGSTER_HOME := $(CURDIR)/.dagster
# Python keeps what it compiled: a run starts hundreds of processes on the same files. Where a
# shell forbids that, collecting the tests alone took 21 CPU seconds a worker instead of 13.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test check up clean lock browser

help: ## what can be made
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/.ready ## install the pinned environment into .venv

.venv/.ready: requirements/cpu.lock tools/setup.sh
	@tools/setup.sh "$(PYTHON)"

demo: setup ## documents to a served, certified release; one question; one trace
	@python -m pipelines.demo

up: setup ## Dagster, MLflow, gateway and engine in the foreground; Ctrl-C ends them all
	@tools/ratchet up

check: setup ## the fast half: lint, types, import rules, unit tests
	@tools/check.sh fast

test: setup browser ## every check, with one real run of the whole pipeline
	@tools/check.sh all

browser: setup
	@tools/browser.sh

lock: setup ## resolve the lock again after changing pyproject.toml
	@tools/lock.sh

clean: ## stop what this checkout started; remove what it made (not .venv)
	@if [ -e .venv/.ready ]; then tools/ratchet down; fi
	@rm -rf .ratchet .dagster .dvc/tmp .dvc/cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find data -mindepth 1 -maxdepth 1 ! -name .gitignore ! -name anchor.json ! -name golden ! -name policies ! -name shipped ! -name sources ! -name stable.json -exec rm -rf {} +
