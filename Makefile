PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test test-slow lint typecheck docs bench-peers clean

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

# One environment for each peer that the benchmarks run beside us, at the
# versions of the published tables. fedjax runs with no later jax or numpy.
PEERS ?= qwix torch breaching fedjax pfl flower
qwix_packages := qwix==0.1.8
torch_packages := torch==2.14.1
breaching_packages := breaching==0.1.2 torch==2.14.1 torchvision==0.29.1
fedjax_packages := fedjax==0.0.17 jax==0.4.33 jaxlib==0.4.33 \
  dm-haiku==0.0.13 "numpy<2.3"
pfl_packages := pfl==0.6.0 torch==2.14.1
flower_packages := "flwr[simulation]==1.42.0" torch==2.14.1
PEER_ENVIRONMENTS := $(PEERS:%=.venv-peers/%/.installed)

bench-peers: $(PEER_ENVIRONMENTS)

.venv-peers/%/.installed:
	test -x .venv-peers/$*/bin/python || $(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet \
	  --disable-pip-version-check numpy $($*_packages)
	touch $@

# The pages as a site in site/, without a warning.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build site dist *.egg-info
