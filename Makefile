# `make demo` and `make test` each work alone in a fresh clone: both build the environment first, where it is not there.
# Needed beforehand: git, make and Python 3.11 or newer.

VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
SOURCES := trl_ext $(wildcard plugins/*/src/*)
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest $(ARGS)

# One thread a process: the models are tiny, and the workers share the cores. No test or demo needs a network.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-all test-gpu margins soak lint format types docs clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## Build the environment in .venv: the core and all plugins, editable

$(STAMP): pyproject.toml constraints.txt $(addsuffix pyproject.toml,$(PLUGINS))
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]' $(addprefix -e ./,$(PLUGINS))
	@touch $@

demo: setup  ## Train, fine-tune on noisy demonstrations with and without plugins, compare (ARGS=--quick for a smoke run)
	$(BIN)/trl-ext demo $(ARGS)

test: setup  ## Run the fast tests
	$(PYTEST) -m "not slow and not gpu" -n $(WORKERS) --dist worksteal

test-all: setup  ## Run the slow tests too
	$(PYTEST) -m "not gpu" -n $(WORKERS) --dist worksteal

test-gpu: setup  ## Run the tests that need a CUDA device
	$(PYTEST) -m gpu

margins: setup  ## Show how near each fast test comes to its tolerance (ARGS=tests/test_gradients.py for some)
	PYTHONPATH=tests $(PYTEST) -p margins -m "not slow and not gpu" -n $(WORKERS) --dist worksteal

soak: setup  ## Kill runs at random times, resume them and compare every byte (ARGS="--kills 60")
	$(BIN)/python tests/soak/soak.py $(ARGS)

lint: setup  ## Check style, formatting, and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: setup  ## Repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## Check the types of the core and of every plugin
	$(BIN)/mypy $(SOURCES)

docs: setup  ## Build the documentation into build/docs; needs no network, and a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

clean:  ## Remove the environment, caches and builds; keep runs/
	rm -rf $(VENV) .nox build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
