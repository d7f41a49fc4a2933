# `make quickstart` and `make test` set up everything from a fresh clone. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
BIN := .venv/bin/python
PYTEST_ARGS ?=

.PHONY: quickstart test lint clean

quickstart: .venv/train.stamp
	$(BIN) -m coterie.cli quickstart

test: .venv/dev.stamp
	$(BIN) -m pytest -q $(PYTEST_ARGS)

lint: .venv/dev.stamp
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pyright

# The stamp is named after the extra that it installed.
.venv/%.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'coterie needs Python 3.11 or newer: make PYTHON=python3.12')"
	@test -x $(BIN) || $(PYTHON) -m venv .venv
	@echo "Installing coterie[$*] into .venv (minutes, once)"
	@$(BIN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	@touch $@

clean:
	rm -rf .venv quickstart runs
