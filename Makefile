# make demo   judge the bundled recording           make test   run the tests
# make lint   ruff, style and format                make types  mypy --strict
# make bench  time and memory of judging and parsing   make setup  the environment for all of these
# make test-torch   also the tests that measure for real, on torch's CPU build
# make test-aiconfigurator   also the tests that let the real one read opkit's tables (1 GB)
# make docs   the pages of docs/ as a site: build/site/index.html

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test test-torch test-aiconfigurator lint types bench docs

setup: $(VENV)/.dev

$(BIN)/opkit: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(BIN)/opkit
	$(BIN)/opkit align dsa --recorded

test: setup
	$(BIN)/python -m pytest

# Another build: make test-torch TORCH="torch==…"
TORCH ?= torch==2.13.0
test-torch: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' 'nvtx<=0.2.11' \
	    safetensors 'transformers==5.23.0'
	$(BIN)/python -m pytest tests/collect tests/layers tests/test_cli_collect.py tests/test_cli_comm.py

# In an environment of its own, as a user would have it: it wants other versions than opkit.
AICONFIGURATOR = $(abspath $(VENV)/aiconfigurator/bin/python)
test-aiconfigurator: setup
	$(PYTHON) -m venv $(VENV)/aiconfigurator
	$(AICONFIGURATOR) -m pip install --quiet --disable-pip-version-check aiconfigurator==0.12.0
	OPKIT_AICONFIGURATOR=$(AICONFIGURATOR) $(BIN)/python -m pytest \
	    tests/collect/test_install.py tests/collect/test_validate.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/judge_files.py
	$(BIN)/python benchmarks/parse.py

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/zensical build --strict
