# make demo       a real model, tensor-parallel on three ranks, in every format: two to three minutes on two cores
# make test-fast  the CPU tests that compile nothing, emulate nothing and start no processes: under a minute
# make test       all CPU tests
# make test-compile  every kernel of the covering set for every architecture: half an hour on two cores
# make test-engines  a real vLLM on CPU ranks, with and without Collogue: minutes, in an environment of its own
# make test-gpu   GPU tests, on whatever GPUs there are
# make docs       the documentation site, into build/site; SITE_ARGS=serve shows it
# make check      lint, types and all CPU tests
#
# PYTHON=python3.12 chooses the Python; its torch is used if it has one. The rest is in scripts/setup.sh.

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
PYTEST_ARGS ?=
SITE_ARGS ?= build --strict
DEMO_ARGS ?= --json build/demo.json --plot build/demo.png
BIN = .venv/bin
export PYTHON CONSTRAINTS
# Only the plugins that pyproject.toml names.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1

.PHONY: demo docs test test-fast test-gpu test-compile test-engines check lint setup clean

demo: setup
	@mkdir -p build
	$(BIN)/collogue demo $(DEMO_ARGS)

docs:
	EXTRAS=docs scripts/setup.sh
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(SITE_ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cpu -n 2 $(PYTEST_ARGS)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cpu -n 2 -m "not slow" $(PYTEST_ARGS)

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu -m gpu $(PYTEST_ARGS)

test-compile: setup
	$(BIN)/python -m pytest tests/compile $(PYTEST_ARGS)

test-engines:
	scripts/test_engines.sh

# With the extras dev and docs, which lint installs, the tests also run mypy and pyright on README's blocks and the examples,
# and build the documentation site.
check: lint test

lint:
	EXTRAS=test,demo-tools,dev,docs scripts/setup.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_source.py

setup:
	@scripts/setup.sh

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
