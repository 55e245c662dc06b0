# demo: a demonstration; test: fast tests; test-slow: the tests that are slow or need a browser or a
# GPU; check: format, lint, types, prose, vulnerabilities. Each target installs its requirements.

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
	$(BIN)/python .ci/prose.py
	$(MAKE) audit

# fails on a known vulnerability; passes with a message if the database is not reachable
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and without the constraint's build tag, so that pip can choose a build for this machine
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
