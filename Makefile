PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test test-slow lint typecheck bench-peers clean

setup: $(STAMP)

# The lock file fixes every version; the bounds are in pyproject.toml.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/python -m experiments.main \
	  --flagfile=experiments/flags/quickstart.flags --overwrite

test: setup
	$(BIN)/python -m pytest -n 2 --dist=loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist=loadfile -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

# One environment for each peer that the benchmarks run beside us.
PEERS ?= qwix torch breaching
bench-peers:
	for peer in $(PEERS); do \
	  test -x .venv-peers/$$peer/bin/python || \
	    $(PYTHON) -m venv .venv-peers/$$peer; \
	  .venv-peers/$$peer/bin/python -m pip install --quiet \
	    --disable-pip-version-check numpy $$peer; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info
