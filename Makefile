# Everything runs in .venv, made on first use with the versions in constraints.txt. A second call installs nothing.
#
#   make demo         the quickstart recipe: train, go on in a new domain in three ways, merge, report
#   make test         the test suite
#   make check        format, lint, types, layers
#   make bench        measure the methods' claims (hours)
#   make demo-seeds   the quickstart recipe with five seeds, and its picture
#   make docs         pages made from code
#   make clean        .venv and caches; runs/ is left alone

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt
RUNTIME := .venv/.runtime
DEV := .venv/.dev

.PHONY: demo test check bench demo-seeds docs clean

demo: $(RUNTIME)
	@echo "A 1 M-parameter Llama learns English prose, then Python code in three ways, then is merged: what does it forget?"
	@echo "Text: this Python's own documentation and standard library. Two to six minutes on two cores; call again to go on."
	$(BIN)/tutelage run recipes/quickstart/demo.yaml
	@echo
	@echo "Your own model and file:  $(BIN)/tutelage new recipe ./my-model my-data.jsonl && $(BIN)/tutelage run recipe.yaml"

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -q

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

bench: $(RUNTIME)
	$(BIN)/tutelage bench --all

demo-seeds: $(RUNTIME)
	$(BIN)/python -m bench.demo_seeds

docs: $(RUNTIME)
	$(BIN)/python -m tutelage.base.foreign > docs/coming-from.md
	$(BIN)/python -m tutelage.pages docs/methods
	$(BIN)/python -m tutelage.catalog.pages docs/papers README.md

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find tutelage tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: it is the large one, and what pip is told of where to find it (an index of CPU or CUDA builds)
# decides which build the rest then settles on.
$(RUNTIME): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -x $(BIN)/pip || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch 2.13.0 into .venv (0.7 GB on disk for CPU, several GB with CUDA)"
	@$(PIP) torch==2.13.0
	@echo "Installing Tutelage and what it needs (about 0.9 GB more)"
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing what the tests need (about 0.1 GB more)"
	@$(PIP) --editable '.[dev]'
	@touch $@
