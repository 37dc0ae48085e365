# Every target makes its own set-up (.venv) and runs; nothing needs activating.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := rredcot_jax experiments configs tools tests benchmarks setup.py

export JAX_PLATFORMS ?= cpu

.PHONY: demo demo-seeds test lint bench clean

demo: .venv/ready
	$(BIN)/python experiments/demo.py --demo_dir runs/demo

demo-seeds: .venv/ready
	$(BIN)/python experiments/demo.py --demo_dir runs/demo-seeds --seeds 5

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy rredcot_jax

bench: .venv/ready
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/credit_overhead.py

.venv/ready: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; try make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	touch $@

clean:
	rm -rf .venv runs
