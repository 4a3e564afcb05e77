# make demo    boot a Linux guest over the API, watch it work, see where the time went
# make test    everything that can fail
# Also: setup build lint bench fuzz soak documents guest-kernel clean
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FIRECRACKER ?=
FUZZ_SECONDS ?= 600
TARGET ?=

.PHONY: demo test documents soak setup build lint bench fuzz guest-kernel guest-bare clean

demo: build $(VENV)/.images
	$(BIN)/python tools/demo

test: setup lint
	$(BIN)/python -m pytest tests $(PYTEST_ARGS)
	CRACKLE_LAUNCHED=1 $(BIN)/python -m pytest tests/api $(PYTEST_ARGS)

# Every command and example of README and docs/, as a reader does them: minutes for each document where guests are emulated.
documents: setup
	$(BIN)/python -m pytest tests/linux/test_documents.py -m documents $(PYTEST_ARGS)

# The same again and again: snapshots of busy guests in long chains, and amid kills.
soak: setup
	$(BIN)/python -m pytest -s tests/api/test_abuse.py tests/kvm/test_soak.py tests/kvm/test_soak_clones.py tests/kvm/test_seccomp_policy.py \
	  tests/linux/test_soak.py tests/linux/test_identity.py tests/linux/test_console.py -m soak $(PYTEST_ARGS)

setup: build guest-bare guest-kernel $(VENV)/.images

# Debian packages first: one of them may be what `python3 -m venv` or the compiler needs.
$(VENV)/.packages: tools/setup-host
	$(PYTHON) tools/setup-host packages
	mkdir -p $(VENV)
	touch $@

$(VENV)/.ready: pyproject.toml | $(VENV)/.packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages and building the core: a minute or two"
	$(BIN)/python -m pip install -q --disable-pip-version-check 'Cython>=3.1' 'setuptools>=77'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $@

# What changed since is compiled in place.
build: $(VENV)/.packages $(VENV)/.ready
	@$(BIN)/python setup.py -q build_ext --inplace build_scripts --build-dir $(BIN)
	@$(BIN)/python -m compileall -q src

$(VENV)/.images: $(VENV)/.ready tools/setup-host $(wildcard tools/hostkit/* guest/rootfs/* guest/kernel/stock*)
	$(PYTHON) tools/setup-host images
	touch $@

guest-bare:
	@$(MAKE) -s -C guest/bare

guest-kernel: $(VENV)/.ready
	@$(PYTHON) guest/kernel/build

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH=$(CURDIR)/$(BIN):$$PATH cython-lint src
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml --ignore-disjoint-bases --allowlist tests/stubs.allow \
	  $$(cd src && find crackle -name '*.pyi' | sed 's/\.pyi$$//; s,/,.,g')

bench: setup
	$(BIN)/python -m bench $(if $(FIRECRACKER),--firecracker $(FIRECRACKER))

# Coverage-guided, for FUZZ_SECONDS each: all targets, or TARGET="net block"; then the hypothesis tests, and
# threads against each other under ThreadSanitizer.
fuzz: build $(VENV)/.fuzz
	$(BIN)/python tests/fuzz/fuzzer.py --seconds $(FUZZ_SECONDS) $(TARGET)
	$(if $(TARGET),,CRACKLE_HYPOTHESIS=fuzz $(BIN)/python tests/fuzz/asan.py --timeout 0 \
	  $(wildcard tests/fuzz/test_hostile*.py) tests/unit/test_queue.py tests/unit/test_block.py)
	$(if $(TARGET),,$(BIN)/python tests/fuzz/tsan.py $(FUZZ_SECONDS))

$(VENV)/.fuzz: $(VENV)/.ready
	$(PYTHON) tools/setup-host fuzz
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[fuzz]'
	touch $@

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src \( -name '*.so' -o -name __pycache__ \) -exec rm -rf {} +
