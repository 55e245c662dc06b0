# demo shows the library; test runs the tests of a change, test-slow the rest of them (long forms, a
# browser, a GPU); check reads the code. Each installs what it needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow check audit format

demo: $(VENV)/.demo
	$(BIN)/everlong demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not (slow or browser or gpu)"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or browser or gpu"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) audit

# a known vulnerability fails; a machine that cannot ask says so and passes
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and by its version alone, so that pip is free to take a build for this machine
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .[plot]
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .[dev]
	touch $@
