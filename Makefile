# make help tells what there is. Every target sets up .venv first, which takes no time when nothing changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
# Two files of tests at a time (ARGS='-n 0' for one): most keep one core busy.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export PYTHONUNBUFFERED := 1
# Every process of a run imports Megatron: with bytecode on disk that takes half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo compare test test-slow test-engines checks bench findings clean

help:  ## list the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup:  ## make .venv with the package and what it needs (about 5 GB)
	@scripts/setup.sh

demo: setup  ## from text to a dense model to two Mixtures-of-Experts, on two processes (one with a single GPU)
	@$(PYTHON) -m tools.experiments.demo $(ARGS)

compare: setup  ## the paper's six methods over three seeds, from one dense model (ARGS= another file)
	@$(PYTHON) -m tools.experiments.compare $(or $(ARGS),configs/compare/methods.yaml)

test: setup  ## run the tests; ARGS= adds options of pytest
	@$(PYTEST) $(ARGS)

test-slow: setup  ## run the tests that make test leaves out
	@$(PYTEST) -m slow $(ARGS)

test-engines: setup  ## run exports in vLLM and llama.cpp, in environments of their own (.engines; first time 20 minutes)
	@scripts/setup_engines.sh
	@$(PYTHON) -m pytest -m engines $(ARGS) tests/engines

checks: setup  ## lint, format and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

bench: setup  ## speed and memory beside the plain alternatives (best on an idle machine)
	@status=0; for bench in tools/benchmarks/bench_*.py; do echo "== $$bench"; $(PYTHON) $$bench || status=1; done; exit $$status

findings:  ## show what surprised us in public packages, each in an environment of its own (needs the network)
	@export PYTHON=$$(scripts/find_python.sh); status=0; for finding in findings/*.sh; do echo "== $$finding"; bash $$finding || status=1; done; exit $$status

clean:  ## remove caches and what demo, compare, bench, examples and builds wrote; .venv stays
	rm -rf demo compare bench example build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
