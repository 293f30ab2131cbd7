# One environment in .venv; a stamp file remembers what was installed, so that a second start is quick.
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 3000
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve test audit bench fmt clean
.DELETE_ON_ERROR:

demo: $(VENV)/.worker
	@exec $(BIN)/sae-atlas demo --port $(PORT)

serve: $(VENV)/.worker
	@exec $(BIN)/sae-atlas serve --port $(PORT)

test: $(VENV)/.dev
	@.ci/chromium
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# What is known against our dependencies changes without us, and needs the network: no part of `make test`.
audit: $(VENV)/.dev
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive app workers migrations
	@$(BIN)/python .ci/audit

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "SAE Atlas needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.12, say." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing. Run: sudo apt-get install --yes python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@.ci/pip-install $(BIN)/python --upgrade pip

$(VENV)/.worker: pyproject.toml | $(BIN)/python
	@echo "Installing SAE Atlas with torch and transformers (some minutes the first time)"
	@.ci/pip-install $(BIN)/python --editable ".[worker]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing SAE Atlas with what its tests need"
	@.ci/pip-install $(BIN)/python --editable ".[worker,data,oidc,otel,dev]"
	@touch $@ $(VENV)/.worker

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
