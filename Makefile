# `make demo` and `make test` do everything on a fresh machine: each makes the virtual environment if it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= What is the capital of France, and what is it known for?

.PHONY: demo test lint format gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/mini-infer generate "$(PROMPT)"

test: $(VENV)/.installed-test lint
	$(BIN)/mini-infer download-demo
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-check: $(VENV)/.installed-test
	PATH=$(abspath $(BIN)):$$PATH bash scripts/gpu_check.sh

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
