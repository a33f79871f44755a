# Needs make, and Python 3.11 or newer with its venv module; all the rest is installed into .venv.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The small networks of the demo and the tests gain nothing from more threads.
OMP_NUM_THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); test $$n -lt 4 && echo $$n || echo 4)
export OMP_NUM_THREADS

# Kept, what Python compiled: each process of the tests would otherwise compile dkdm and the tests again.
export PYTHONDONTWRITEBYTECODE :=

DEMO_DIR := runs/demo
LADDER_DIR := runs/ladder
LADDER_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
# `fast` has no help: it is a part of `test`.
.PHONY: help demo ladder test fast test-slow lint wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## distil a small teacher on the CPU and write a page of results
	$(BIN)/dkdm distill --recipe demo --output-dir $(DEMO_DIR)

ladder: $(INSTALLED) ## the paper's Table 2 and Fig. 4 at small scale; an hour on two cores, goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ladder.py $(LADDER_DIR) $(LADDER_ARGS) # a cell on each core

test: $(INSTALLED) ## the gate: lint and types, and beside them the tests that take seconds
	@$(MAKE) --no-print-directory --jobs 2 lint fast

fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) # one thread a worker

test-slow: $(INSTALLED) ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

lint: $(INSTALLED) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(INSTALLED) ## build dist/dkdm-*.whl
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
