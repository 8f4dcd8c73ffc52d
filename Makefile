# Every target makes what it needs: `make demo` and `make test` work as the first command after a
# clone. PYTHON chooses the interpreter (3.11 or newer) that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests use small tensors: one thread each is fastest, and leaves the other cores alone.
TEST_ENV := OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-failed faults lint check bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# Installing compiles the scan kernel, so it is done again when the kernel's sources change.
$(VENV)/installed: pyproject.toml $(wildcard medmamba/scan/native/*.[ch] medmamba/scan/native/build.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## train three simulated hospitals on generated images
	$(BIN)/python simulation/run.py --scenario quick

test: $(VENV)/installed-dev  ## unit, contract, integration and one end-to-end test
	$(TEST_ENV) $(BIN)/python -m pytest tests/unit tests/contract tests/integration tests/e2e -m 'not slow' --durations=10

test-all: $(VENV)/installed-dev  ## everything; a skip that is not listed in tests/skips.txt fails
	$(TEST_ENV) $(BIN)/python -m pytest tests --durations=25 --fail-on-unlisted-skips

faults: $(VENV)/installed-dev  ## inject every fault and write docs/reliability.md
	$(TEST_ENV) $(BIN)/python -m pytest tests/faults --write-reliability docs/reliability.md

test-failed: $(VENV)/installed-dev  ## only what failed last time
	$(TEST_ENV) $(BIN)/python -m pytest tests --last-failed --last-failed-no-failures none --fail-on-unlisted-skips

lint: $(VENV)/installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

check: lint  ## lint, then unit and contract tests
	$(TEST_ENV) $(BIN)/python -m pytest tests/unit tests/contract

bench: $(VENV)/installed-dev  ## measure the figures of docs/benchmarks.md and write that page
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	$(BIN)/python benchmarks/run_all.py

clean:  ## remove the environment and caches; runs and site files stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
