PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup build
setup: $(VENV)/.ready build

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q msgspec httptools typer rich Cython cython-lint hypothesis mypy pre-commit pytest pytest-timeout ruff 'setuptools>=77'
	touch $@

build: $(VENV)/.ready
	$(BIN)/python setup.py -q build_ext --inplace
