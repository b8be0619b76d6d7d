SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The interpreter that creates the virtual environment: the first one that runs,
# is Python 3.11 or newer, and can make an environment with pip in it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# What is installed into .venv, and the versions of it.
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt

# Test processes run side by side; 0 runs the tests in one process.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

# Parallel workers get one thread each, so that they do not fight over the cores;
# a single process is left to pick its own number of threads.
ifeq ($(PYTEST_WORKERS),0)
TEST_ENV := env -u OMP_NUM_THREADS HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
else
TEST_ENV := env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
endif

.PHONY: help install demo docs test lint typecheck clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Create .venv and install the package with its development tools

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is required (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## Run the demonstration; results go to outputs/demo
	$(BIN)/python examples/demo.py --output_dir outputs/demo

docs: $(STAMP) ## Build the documentation into outputs/site; a broken link is an error
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test: $(STAMP) ## Run the tests (PYTEST_WORKERS=2, PYTEST_ARGS=)
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_iau

typecheck: $(STAMP) ## Check types only
	$(BIN)/mypy hf_iau

clean: ## Remove .venv, caches, build products and outputs
	rm -rf $(VENV) outputs build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
