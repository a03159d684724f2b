# The two commands are `make demo` and `make test`; both make .venv if it is missing.  `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Test processes, one thread each.
WORKERS ?= 2
# Without an NVIDIA GPU: the release the results were made with, in its CPU build.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= $(if $(GPU),torch>=2.9,torch==2.13.0)
# Where that build lies; pip is not shown it where it cannot be reached (pip would wait and then do without).
CPU_BUILDS ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Nothing here may reach for a model hub, and pyright needs no look at its newest release.
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format gpu-test clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed-demo  ## train EPIC on the pictures that come with the project, beside its rivals
	$(BIN)/epic-fast demo --output runs/demo

test: lint  ## format, lint and type checks, then every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test  ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test  ## put the source files into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu-test: $(VENV)/.installed-test  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

clean:  ## remove what was built (.venv and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
		"epic_fast needs Python 3.10 or newer; %s is %d.%d: make PYTHON=python3.11 ..." \
		% ((sys.executable,) + sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)

# torch first: left to the project's own range, pip would take the newest release with all of CUDA.
$(VENV)/.installed-%: pyproject.toml setup.py | $(BIN)/pip
	@echo "Installing $(TORCH) and epic_fast[$*] into $(VENV): minutes the first time, nothing the next."
	$(PIP) "$(TORCH)" $(if $(GPU),,$$($(BIN)/python -c 'import urllib.request as r; r.urlopen("$(CPU_BUILDS)/torch/", timeout=5)' \
		2>/dev/null && echo --extra-index-url $(CPU_BUILDS)))
	$(PIP) --editable ".[$*]"
	@touch $@
