# Every target makes the virtual environment itself when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false
# `axolotl train` starts `accelerate`, which it looks for on the path.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: venv demo test slow check docs bench clean

venv: $(READY)  ## The virtual environment alone, in .venv

demo: $(READY)  ## Align the tiny world's model with and without T-Vaccine, attack both, and report
	axolotl tvac tiny-world --output outputs/tiny_world
	axolotl tvac run recipes/chain_tiny.yml

test: $(READY)  ## The default tests: offline, no GPU
	python -m pytest -n 2 --dist loadfile

slow: $(READY)  ## Tests that start the real commands, minutes each
	python -m pytest -n 2 --dist loadfile -m slow

check: $(READY)  ## Lint (with security rules), format, types, dependencies
	ruff check .
	ruff format --check .
	mypy
	python tools/audit.py

docs: $(READY)  ## Write the generated reference pages
	python docs/generate.py

bench: $(READY)  ## What a step of each defense costs, held against the stored baseline
	axolotl tvac bench --output outputs/bench --baseline tvac_plugin/bench/baseline.json

clean:  ## Remove what the demo and the tests wrote
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[axolotl,dev]'
	touch $(READY)
